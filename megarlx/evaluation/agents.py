"""How often a policy solves tasks of an environment that it acts in over several turns.

Data-parallel ranks share the tasks. A lost episode (the environment's fault) counts nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megarlx import plug
from megarlx.comm.collectives import gather_values
from megarlx.config.environment import EnvironmentConfig
from megarlx.config.evaluation import SuiteConfig
from megarlx.data.conversations import Template
from megarlx.data.prompts import PromptKeys, read_prompts
from megarlx.data.synthetic.draw import Draw
from megarlx.data.tokenizer import Tokenizer
from megarlx.evaluation.pass_at_k import mean_and_error
from megarlx.evaluation.questions import Question, SuiteError, questions_of
from megarlx.evaluation.sampling import settings_of
from megarlx.generation.engine import Engine
from megarlx.model.build import ParallelModel
from megarlx.objectives.environment_rollout import Start
from megarlx.objectives.environments.demonstrations import built_in, success_rate
from megarlx.objectives.episode_sampler import Player, example_of, task_of
from megarlx.objectives.episodes import Episode

PARTS = ("success", "valid_actions", "turns", "reward")
Lines = list[dict[str, Any]]


def play(
    model: ParallelModel,
    tokenizer: Tokenizer,
    template: Template,
    suite: SuiteConfig,
    *,
    seed: int,
    slots: int = 256,
    prefill_tokens: int | None = None,
    kept_samples: int = 2,
) -> tuple[Lines, Lines]:
    """(an item for each task, episodes to read); called by all ranks, and the same on all."""
    environment, group = suite.environment, model.mesh.dp
    assert environment is not None
    assert suite.path is not None
    longest, allowed = environment.max_episode_tokens, model.config.max_sequence_length
    if longest > allowed:
        raise SuiteError(
            f"suite {suite.name}: environment.max_episode_tokens is {longest}; "
            f"model.max_sequence_length allows {allowed}"
        )
    keys = PromptKeys(suite.question_key, suite.answer_key)
    prompts = read_prompts(suite.path, keys)[: suite.questions]
    questions, n = questions_of(suite, None), suite.samples
    mine = range(group.rank, len(prompts), group.size)
    starts = [Start(i, task_of(prompts[i]), 0, tuple(range(i * n, (i + 1) * n))) for i in mine]
    most = -(-len(prompts) // group.size) * n
    at_once = min(slots, most)
    engine = Engine.of(
        model,
        slots=at_once,
        longest=longest,
        detokenize=tokenizer.decode_sampled,
        prefill_tokens=prefill_tokens,
    )
    player = Player(environment, lambda: engine, template, tokenizer, model.mesh)
    sampling = settings_of(suite, tokenizer)
    try:
        episodes = player.play(starts, sampling, seed, group)
    finally:
        player.close()
    penalty = environment.invalid_action_penalty
    found = []
    for at, i in enumerate(mine):
        played = episodes[at * n : (at + 1) * n]
        lines = [
            {**example_of(episode, penalty), "id": questions[i].id}
            for episode in played[:kept_samples]
        ]
        found.append((item(questions[i], played, penalty), lines))
    every = gather_values(found, group)
    # Rank r took tasks r, r + size, …
    ordered = [every[i % group.size][i // group.size] for i in range(len(prompts))]
    return [entry for entry, _ in ordered], [line for _, held in ordered for line in held]


def item(
    question: Question, episodes: Sequence[Episode], invalid_action_penalty: float
) -> dict[str, Any]:
    """Means over the task's episodes that were not lost; null where all were."""
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


def at_random(suite: SuiteConfig, seed: int) -> dict[str, float]:
    """What a policy reaches that draws its actions at random, as often and for as many turns; of
    the environments that come with megarlx and can say what such an action is."""
    environment = suite.environment
    assert environment is not None
    assert suite.path is not None
    if not _draws_actions(environment):
        return {}
    keys = PromptKeys(suite.question_key, suite.answer_key)
    tasks = [task_of(one) for one in read_prompts(suite.path, keys)[: suite.questions]]
    draw = Draw(seed, "random")
    often = tasks * suite.samples
    made = built_in(environment)
    return {"success": success_rate(made, often, max_turns=environment.max_turns, draw=draw)}


def _draws_actions(environment: EnvironmentConfig) -> bool:
    return environment.function in plug.ours("environment") and environment.function != "gymnasium"


def summary(items: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Means over tasks, with standard errors; and the share of episodes that were lost."""
    known = [entry for entry in items if entry["samples"]]
    if not known:
        raise SuiteError("agent: every episode of every task was lost")
    made = {part: mean_and_error([entry[part] for entry in known]) for part in PARTS}
    metrics = {part: estimate.mean for part, estimate in made.items()}
    lost = sum(entry["lost"] for entry in items)
    metrics["lost"] = lost / (lost + sum(entry["samples"] for entry in items))
    return metrics, {part: estimate.standard_error for part, estimate in made.items()}
