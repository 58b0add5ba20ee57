"""A small world to act in, in the words of rl_cases, and reinforcement learning in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rl_cases import TEMPLATE, WORDS, early_word, model
from rl_cases import config as rl_config

from megarlx.config.objectives import RlConfig
from megarlx.data.prompts import Prompt, PromptData
from megarlx.data.tokenizer import WordTokenizer
from megarlx.generation.engine import Engine
from megarlx.model.build import ParallelModel
from megarlx.objectives.environment_game import EnvironmentGame
from megarlx.objectives.environments.interface import Step
from megarlx.objectives.player import Player
from megarlx.objectives.rl import Reinforcement
from megarlx.objectives.rollout import Sampler
from megarlx.objectives.samples import Sample

__all__ = ["Early", "agent_config", "agents", "model", "tasks"]
LONGEST = 60


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
