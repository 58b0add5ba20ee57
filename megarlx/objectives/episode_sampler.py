"""Rollouts of several turns: tasks drawn, episodes played by the policy as it is, and compared.

The counterpart of rollout.py: every data-parallel rank plays its share of the tasks; then all ranks
hold all of it, in the order in which the tasks were drawn.

A line of the tasks' file is {"question": the first observation, "task": {…}}; without "task" the
line is the task.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megarlx.comm.collectives import barrier, gather_values
from megarlx.comm.groups import Group, Mesh
from megarlx.config.environment import EnvironmentConfig
from megarlx.config.objectives import RlConfig
from megarlx.data.conversations import Template
from megarlx.data.order import key_of
from megarlx.data.prompts import Prompt, PromptData
from megarlx.data.tokenizer import Tokenizer
from megarlx.generation.engine import Engine
from megarlx.generation.requests import SamplingSettings
from megarlx.objectives.advantages import uninformative
from megarlx.objectives.environment_process import BrokenEnvironment, EnvironmentPool
from megarlx.objectives.environment_rollout import EnvironmentRollout, Start
from megarlx.objectives.environments.interface import Task
from megarlx.objectives.episodes import Episode, EpisodeBatch, metrics_of, stop_if_too_many_failed
from megarlx.objectives.rollout import Rollout, Sums, sampling_of, with_signal

SEEDS = 1 << 31  # of environments: libraries of random numbers often take no larger ones


class Player:
    """Episodes of this rank's tasks; what stops one copy of the model stops all of them."""

    def __init__(
        self,
        config: EnvironmentConfig,
        engine: Callable[[], Engine],
        template: Template,
        tokenizer: Tokenizer,
        mesh: Mesh,
    ) -> None:
        self.config, self.engine = config, engine
        self.template, self.tokenizer, self.mesh = template, tokenizer, mesh
        self.pool = EnvironmentPool(self.config) if mesh.model.rank == 0 else None
        self.seconds = self.waited_seconds = 0.0  # of the last play: playing, then for others

    def play(
        self, starts: Sequence[Start], sampling: SamplingSettings, seed: int, group: Group
    ) -> list[Episode]:
        """All ranks of the group call this together, each with its own starts, if it has any."""
        rollout = EnvironmentRollout(
            self.engine(), self.config, self.pool, self.template, self.tokenizer
        )
        found: list[Episode] = []
        broken, begun = "", time.perf_counter()
        try:
            found = rollout.run(starts, sampling, seed)
        except BrokenEnvironment as error:
            broken = str(error)
        played = time.perf_counter()
        barrier(group)
        self.seconds, self.waited_seconds = played - begun, time.perf_counter() - played
        said = gather_values(broken, group)
        if why := next((text for text in said if text), ""):
            raise BrokenEnvironment(why)
        stop_if_too_many_failed(self.config, found, group)
        return found

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()


class EpisodeSampler:
    """Draws tasks and plays each of them samples_per_prompt times with the live weights."""

    def __init__(
        self,
        config: RlConfig,
        engine: Callable[[], Engine],
        tasks: PromptData,
        template: Template,
        tokenizer: Tokenizer,
        mesh: Mesh,
        seed: int,
    ) -> None:
        if config.environment is None:
            raise ValueError("episodes: the configuration has no [rl.environment]")
        self.player = Player(config.environment, engine, template, tokenizer, mesh)
        self.config, self.environment = config, self.player.config
        self.prompts, self.mesh, self.seed = tasks, mesh, seed
        self.group = mesh.dp  # shares out the tasks
        self.waited_seconds = 0.0
        self.sampling = sampling_of(config, tokenizer)

    def rollout(self, steps_done: int = 0) -> Rollout:
        config, policy, sums = self.config, self.config.policy, Sums()
        examples: list[dict[str, Any]] = []
        sampled, used, rounds = with_signal(
            config, steps_done, lambda count: self._played(count, sums, examples)
        )
        used = _with_tokens(used, self.environment)
        advantages = used.token_advantages(policy)
        return Rollout(
            used.completions,
            used.rewards,
            advantages,
            used.groups,
            self._metrics(sampled, used, sums, rounds),
            examples,
        )

    def close(self) -> None:
        self.player.close()

    def _played(self, count: int, sums: Sums, examples: list[dict[str, Any]]) -> EpisodeBatch:
        n, group = self.config.samples_per_prompt, self.group
        penalty = self.environment.invalid_action_penalty
        mine = self.prompts.take(count)[group.rank :: group.size]
        starts = [
            Start(
                one.number,
                task_of(one.prompt),
                key_of(self.seed, "environment", one.number) % SEEDS,
                tuple(range(one.number * n, (one.number + 1) * n)),
            )
            for one in mine
        ]
        episodes = self.player.play(starts, self.sampling, self.seed, group)
        self.waited_seconds += self.player.waited_seconds
        sums.add("perf/generate_seconds", self.player.seconds, 1)
        for key, (total, number) in metrics_of(episodes, self.environment.label, penalty).items():
            sums.add(key, total, number)
        examples += [example_of(episode, penalty) for episode in episodes[: 2 * n]]
        device = self.player.engine().device
        batch = EpisodeBatch.of(episodes, penalty, per_task=n, device=device)
        return batch.gathered(group)

    def _metrics(
        self, sampled: EpisodeBatch, used: EpisodeBatch, sums: Sums, rounds: int
    ) -> dict[str, float]:
        metrics = sums.means(self.group, ("rl/environment_failures",))
        made = sampled.completions
        written = torch.segment_reduce(made.written.double(), "sum", lengths=made.lengths)
        # Episodes of a task share the tokens before their first answer.
        earlier = (written.cumsum(0) - written).repeat_interleave(made.lengths)
        alike = made.written.cumsum(0) == earlier
        read = len(made.tokens) - written.sum() - alike.sum() * (1 - 1 / sampled.rewards.shape[1])
        return metrics | {
            "rl/response_length": float(written.mean()),
            "rl/informative_groups": 1 - float(uninformative(sampled.rewards).double().mean()),
            "rl/sampling_rounds": float(rounds),
            "rl/groups_used": float(len(used.numbers)),
            "rl/generated_tokens": float(written.sum()),
            "rl/prompt_tokens": float(read),
        }


def task_of(prompt: Prompt) -> Task:
    task = prompt.metadata.get("task")
    if isinstance(task, dict):
        return task
    return {"question": prompt.question, "answer": prompt.answer, **prompt.metadata}


def example_of(episode: Episode, invalid_action_penalty: float) -> dict[str, Any]:
    """For people to read: what was seen first, and then what was done and seen in turn."""
    lines: list[str] = []
    for number, turn in enumerate(episode.turns):
        if number:
            lines.append(f"  saw: {turn.observation}")
        lines.append(f"did: {turn.action}" + ("" if turn.valid else "  (not valid)"))
    known = episode.failure is None
    return {
        "prompt": episode.turns[0].observation if episode.turns else "",
        "completion": "\n".join(lines),
        "reference": None,
        "reward": sum(episode.rewards_of_turns(invalid_action_penalty)) if known else None,
        "finish_reason": episode.end,
        "turns": len(episode.turns),
    }


def _with_tokens(batch: EpisodeBatch, environment: EnvironmentConfig) -> EpisodeBatch:
    """Without tasks of which no episode has begun: there is nothing to learn from them."""
    begun = sorted(set(batch.groups.tolist()))
    if not begun:
        raise BrokenEnvironment(f"environment {environment.function}: no episode has begun")
    return batch if len(begun) == len(batch.numbers) else batch.chosen(begun)
