"""A small world to act in, in the words of rl_cases, and reinforcement learning in it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from rl_cases import TEMPLATE, WORDS, early_word, model
from rl_cases import config as rl_config

from megarlx.config.objectives import RlConfig
from megarlx.config.reward import RewardConfig
from megarlx.data.conversations import Turn
from megarlx.data.prompts import Prompt, PromptData
from megarlx.data.tokenizer import WordTokenizer
from megarlx.generation.engine import Engine
from megarlx.generation.requests import Completion, Request, SamplingSettings
from megarlx.model.build import ParallelModel
from megarlx.objectives.policy import Reinforcement
from megarlx.rollouts.environment_game import EnvironmentGame
from megarlx.rollouts.environments.interface import Step
from megarlx.rollouts.episodes import Episode
from megarlx.rollouts.player import Game, Player, Start
from megarlx.rollouts.question_game import QuestionGame
from megarlx.rollouts.rewards.rewards import Rewards
from megarlx.rollouts.rewards.sample import Sample
from megarlx.rollouts.rollout import Sampler

__all__ = ["Early", "agent_config", "agents", "model", "played_both_ways", "tasks", "told"]
LONGEST = 60
STOP_STRINGS = ("w1", "w5 w6", "w7", "#### w", "answer")


class Early:
    """Every turn is worth what rl_cases.early_word says of it, and shows how many words it had."""

    def __init__(self, turns: int = 1, dull: bool = False, raise_on: str = "") -> None:
        self.turns, self.dull, self.raise_on = turns, dull, raise_on

    def reset(self, task: dict[str, Any], seed: int) -> str:
        self.task, self.taken = task, 0
        if task.get("broken"):
            raise RuntimeError("there is no such place")
        question: str = task["question"]
        return question

    def step(self, action: str) -> Step:
        if self.raise_on and self.raise_on in action.split():
            raise RuntimeError("asked to")
        self.taken += 1
        (reward,) = early_word([Sample("", action)])
        if self.dull and self.task["dull"]:
            reward = 0.0
        words = len(action.split())
        valid = self.turns == 1 or self.dull or words > 1
        done = self.taken == self.turns
        return f"w{words % 3}", reward, done, {"success": done and reward > 0, "valid": valid}


def tasks(count: int = 11, dull: Sequence[int] = (), broken: Sequence[int] = ()) -> list[Prompt]:
    found = []
    for i in range(count):
        question = " ".join(f"w{(3 * i + j) % 20}" for j in range(1 + i % 4))
        task = {"question": question, "dull": i in dull, "broken": i in broken}
        found.append(Prompt(question, None, {"task": task}))
    return found


def agent_config(
    turns: int = 3, *, limits: dict[str, Any] | None = None, **changes: Any
) -> RlConfig:
    options = {"turns": turns, **(limits or {}).pop("options", {})}
    environment = {
        "function": "agent_cases:Early",
        "options": options,
        "max_turns": turns,
        "max_turn_tokens": 9,
        "max_episode_tokens": LONGEST,
        "workers": 0,
        **(limits or {}),
    }
    # what rl_cases gives as rewards is the environment's business here
    plain = [{"function": "final_number"}]
    return rl_config(environment=environment, rewards=plain, **changes)


def agents(
    given: RlConfig,
    policy: ParallelModel,
    *,
    questions: Sequence[Prompt] | None = None,
    seed: int = 5,
) -> Reinforcement:
    tokenizer = WordTokenizer(WORDS)
    engine = Engine.of(policy, slots=given.slots, longest=LONGEST)
    data = PromptData(questions or tasks(), TEMPLATE, tokenizer, seed, name="rl")
    assert given.environment is not None
    game = EnvironmentGame(given.environment, TEMPLATE, tokenizer, policy.mesh)
    sampler = Sampler(given, Player(lambda: engine, game, tokenizer), data, policy.mesh.dp, seed)
    return Reinforcement("rl", given, policy, sampler)


def played_both_ways(
    number: int, policy: ParallelModel
) -> tuple[list[Episode], list[Episode], list[Completion]]:
    """Random questions, limits and stop strings: (answered and scored, played in an environment
    that ends after one answer, as completions) with the same ids and seed."""
    draw, mesh, tokenizer = random.Random(number), policy.mesh, WordTokenizer(WORDS)
    samples, seed = draw.randint(1, 5), draw.randint(0, 999)
    sampling = SamplingSettings(
        temperature=draw.choice([1.0, 0.7, 1.5]),
        top_k=draw.choice([0, 0, 6]),
        stop_tokens=(tokenizer.eos_id,),
        stop_strings=tuple(draw.sample(STOP_STRINGS, draw.randint(0, 3))),
    )
    new = draw.randint(1, 9)
    starts = [
        Start(
            i,
            tuple(1000 - 7 * (i * samples + s) for s in range(samples)),
            one,
            TEMPLATE.prompt_ids((Turn("user", one.question),), tokenizer),
        )
        for i, one in enumerate(tasks(draw.randint(1, 11)))
    ][mesh.dp.rank :: mesh.dp.size]
    options = {"slots": draw.randint(1, 12), "longest": LONGEST}
    engine = Engine.of(policy, **options, detokenize=tokenizer.decode_sampled)
    reward = RewardConfig(function="rl_cases:early_word", workers=0)
    acting = agent_config(1, limits={"max_turn_tokens": new}).environment
    assert acting is not None
    games: list[Game] = [
        QuestionGame(Rewards((reward,)), new, mesh),
        EnvironmentGame(acting, TEMPLATE, tokenizer, mesh),
    ]
    answered, acted = (
        Player(lambda: engine, game, tokenizer).play(starts, sampling, seed, mesh.dp)
        for game in games
    )
    requests = [Request(one.ids, one.sequence_ids, new) for one in starts]
    return answered, acted, engine.generate(requests, sampling, seed)


def told(episode: Episode) -> dict[str, Any]:
    """All that is known of an episode of one turn."""
    (turn,), made = episode.turns, episode.trajectory
    assert made is not None
    return {
        "id": episode.sequence_id,
        "tokens": made.tokens.tolist(),
        "written": made.written.tolist(),
        "logprobs": made.logprobs.tolist(),
        "sampled_logprobs": made.sampled_logprobs.tolist(),
        "reasons": [*made.reasons],
        "truncated": episode.truncated,
        "turn": (episode.group, turn.observation, turn.action, turn.reward),
    }
