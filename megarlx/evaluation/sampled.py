"""Questions and tasks, played: what suites that sample are made of.

Data-parallel ranks share the questions. The same seed gives a question the same samples whatever
the layout, up to what generation/widths.py says about rounding. A lost episode (the environment's
fault) counts nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from megarlx import plug
from megarlx.comm.collectives import gather_values
from megarlx.comm.groups import Group, Mesh
from megarlx.config.environment import EnvironmentConfig
from megarlx.config.evaluation import SuiteConfig
from megarlx.data.conversations import Template
from megarlx.data.draw import Draw
from megarlx.data.prompts import FewShot, Prompt
from megarlx.data.tokenizer import Tokenizer
from megarlx.evaluation.form import reward_of
from megarlx.evaluation.interface import Progress
from megarlx.evaluation.pass_at_k import mean_and_error
from megarlx.evaluation.questions import Question, SuiteError
from megarlx.generation.interface import generator_of
from megarlx.generation.requests import SamplingSettings
from megarlx.model.build import ParallelModel
from megarlx.rollouts.environment_game import EnvironmentGame, task_of
from megarlx.rollouts.environments.interface import built_in, success_rate
from megarlx.rollouts.episodes import Episode
from megarlx.rollouts.player import Game, Player, Start
from megarlx.rollouts.question_game import QuestionGame
from megarlx.rollouts.rewards.rewards import Rewards

ROUNDS = 8  # a round fills the engine's slots so often: its end, with empty slots, is short
PARTS = ("success", "valid_actions", "turns", "reward")  # of an agent's episodes
T = TypeVar("T")


@dataclass(frozen=True)
class Played:
    question: Question
    episodes: tuple[Episode, ...]
    lines: tuple[dict[str, Any], ...]  # of the first episodes, to be read

    @property
    def rewards(self) -> list[float]:
        """Of answers; NaN where not known."""
        return [episode.reward() for episode in self.episodes]

    @property
    def truncated(self) -> int:
        return sum(episode.truncated for episode in self.episodes)


def settings_of(suite: SuiteConfig, tokenizer: Tokenizer) -> SamplingSettings:
    return SamplingSettings(
        temperature=suite.temperature,
        top_p=suite.top_p,
        stop_tokens=(tokenizer.eos_id,),
        stop_strings=suite.stop_strings,
    )


def play(
    model: ParallelModel,
    tokenizer: Tokenizer,
    template: Template,
    suite: SuiteConfig,
    questions: Sequence[Question],
    few_shot: FewShot,
    *,
    seed: int,
    slots: int = 256,
    prefill_tokens: int | None = None,
    kept_samples: int = 0,
    progress: Progress | None = None,
) -> list[Played]:
    """Called by all ranks; each gets the questions of its data-parallel rank."""
    prompts = prompts_of(template, tokenizer, suite, questions, few_shot)
    n, group = suite.samples, model.mesh.dp
    mine = range(group.rank, len(questions), group.size)
    most = -(-len(questions) // group.size)  # of any rank
    generator = generator_of(
        suite.generator,
        model,
        slots=min(slots, most * n),
        longest=longest_of(model, suite, prompts),
        detokenize=tokenizer.decode_sampled,
        prefill_tokens=prefill_tokens,
    )
    player = Player(lambda: generator, _game(suite, template, tokenizer, model.mesh), tokenizer)
    settings = settings_of(suite, tokenizer)
    # Every data-parallel rank plays as often as the others: they stop together.
    per_round = max(1, ROUNDS * slots // n)
    found: list[Played] = []
    try:
        for number in range(-(-most // per_round)):
            part = mine[number * per_round : (number + 1) * per_round]
            starts = [
                Start(i, tuple(range(i * n, (i + 1) * n)), _prompt(questions[i]), prompts[i])
                for i in part
            ]
            episodes = player.play(starts, settings, seed, group)
            for at, i in enumerate(part):
                own = tuple(episodes[at * n : (at + 1) * n])
                lines = (player.example(one) for one in own[:kept_samples])
                shown = tuple({**line, "id": questions[i].id} for line in lines)
                found.append(Played(questions[i], own, shown))
            if progress is not None:
                done = min(len(questions), (number + 1) * per_round * group.size)
                progress(done, len(questions))
    finally:
        player.close()
    return found


def gathered(mine: list[T], count: int, group: Group) -> list[T]:
    """JSON values of `count` questions in their order: rank r took questions r, r + size, …"""
    every = gather_values(mine, group)
    return [every[i % group.size][i // group.size] for i in range(count)]


def _prompt(question: Question) -> Prompt:
    return Prompt(question.text, question.reference, question.metadata)


def prompts_of(
    template: Template,
    tokenizer: Tokenizer,
    suite: SuiteConfig,
    questions: Sequence[Question],
    few_shot: FewShot,
) -> list[list[int]]:
    """How each is asked; an environment says by itself how a task begins."""
    if suite.environment is not None:
        return [[] for _ in questions]
    shots = few_shot.ids(template, tokenizer)
    follows = bool(shots)
    return [shots + q.prompt_ids(template, tokenizer, follows=follows) for q in questions]


def longest_of(model: ParallelModel, suite: SuiteConfig, prompts: list[list[int]]) -> int:
    """Tokens of a sequence."""
    if suite.environment is not None:
        longest = suite.environment.max_episode_tokens
        said = f"environment.max_episode_tokens is {longest}"
    else:
        asked = max(map(len, prompts))
        longest = asked + suite.max_new_tokens
        said = f"a prompt has {asked} tokens and max_new_tokens is {suite.max_new_tokens}"
    if longest > model.config.max_sequence_length:
        raise SuiteError(
            f"suite {suite.name}: {said}; model.max_sequence_length allows "
            f"{model.config.max_sequence_length}"
        )
    return longest


def _game(suite: SuiteConfig, template: Template, tokenizer: Tokenizer, mesh: Mesh) -> Game:
    if suite.environment is not None:
        return EnvironmentGame(suite.environment, template, tokenizer, mesh)
    first, form = mesh.model.is_first, suite.form
    rewards = Rewards(suite.rewards) if first else None
    of_form = Rewards([reward_of(form)]) if first and form is not None else None
    return QuestionGame(rewards, suite.max_new_tokens, mesh, of_form)


# Agents.


def agent_item(played: Played, invalid_action_penalty: float) -> dict[str, Any]:
    """Means over the task's episodes that were not lost; null where all were."""
    question, episodes = played.question, played.episodes
    known = [episode for episode in episodes if episode.failure is None]
    turns = [turn for episode in known for turn in episode.turns]
    rewards = [r for e in known for r in e.rewards_of_turns(invalid_action_penalty)]

    def share(total: float, count: int) -> float | None:
        return total / count if count else None

    correct = sum(episode.success for episode in known)
    found = {
        "id": question.id,
        "samples": len(known),
        "correct": correct,
        "truncated": sum(episode.truncated for episode in known),
        "lost": len(episodes) - len(known),
        "success": share(correct, len(known)),
        "valid_actions": share(sum(turn.valid for turn in turns), len(turns)),
        "turns": share(len(turns), len(known)),
        "reward": share(math.fsum(rewards), len(known)),
    }
    return found if question.group is None else {**found, "group": question.group}


def at_random(suite: SuiteConfig, questions: Sequence[Question], seed: int) -> dict[str, float]:
    """What a policy reaches that draws its actions at random, as often and for as many turns; of
    the environments that come with megarlx and can say what such an action is."""
    environment = suite.environment
    assert environment is not None
    if not _draws_actions(environment):
        return {}
    tasks = [task_of(_prompt(one)) for one in questions]
    draw = Draw(seed, "random")
    often = tasks * suite.samples
    made = built_in(environment)
    return {"success": success_rate(made, often, max_turns=environment.max_turns, draw=draw)}


def _draws_actions(environment: EnvironmentConfig) -> bool:
    ours = environment.function in plug.ours("environment")
    return ours and hasattr(plug.resolve("environment", environment.function), "random_action")


def agent_summary(
    items: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, float], dict[str, float]]:
    """Means over tasks, with standard errors; and the share of episodes that were lost."""
    known = [entry for entry in items if entry["samples"]]
    if not known:
        raise SuiteError("agent: every episode of every task was lost")
    made = {part: mean_and_error([entry[part] for entry in known]) for part in PARTS}
    metrics = {part: estimate.mean for part, estimate in made.items()}
    lost = sum(entry["lost"] for entry in items)
    metrics["lost"] = lost / (lost + sum(entry["samples"] for entry in items))
    return metrics, {part: estimate.standard_error for part, estimate in made.items()}
