"""Episodes as what a policy loss is made of: one sequence each, of which it wrote the turns.

An episode's reward is the sum of its turns' rewards, an invalid turn's less the penalty. With a
single turn everything here comes to what is done with a prompt and its completion.

Letters: P tasks, n episodes of each, N episodes that have tokens, T their tokens, K their turns.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from megarlx.comm.collectives import all_reduce_, gather_values
from megarlx.comm.groups import Group
from megarlx.config.environment import EnvironmentConfig
from megarlx.config.policy import PolicyConfig
from megarlx.generation.requests import NOT_WRITTEN, Trajectory
from megarlx.rollouts.advantages import (
    Turns,
    compares_turns,
    sample_advantages,
    turn_advantages,
)
from megarlx.rollouts.completions import Completions, places_of, select
from megarlx.rollouts.environments.process import BrokenEnvironment, Failure
from megarlx.rollouts.exchange import gather_completions, gather_ragged

SHOWN = 300  # characters of an observation or an action in an error


@dataclass(frozen=True)
class Turn:
    observation: str  # what was seen before acting
    action: str
    reward: float = 0.0
    valid: bool = True
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Episode:
    group: int  # number of its task
    sequence_id: int
    turns: tuple[Turn, ...]
    success: bool
    trajectory: Trajectory | None  # None where it never began
    failure: Failure | None = None  # then its reward is not known
    reference: str | None = None  # the answer that it was compared with

    @property
    def truncated(self) -> bool:
        """Ended by a limit of tokens."""
        made = self.trajectory
        return made is not None and (made.full or made.reasons[-1] == "length")

    def rewards_of_turns(self, invalid_action_penalty: float) -> list[float]:
        return [t.reward - (0 if t.valid else invalid_action_penalty) for t in self.turns]

    def reward(self, invalid_action_penalty: float = 0.0) -> float:
        """NaN where it is not known."""
        if self.failure is not None:
            return math.nan
        return math.fsum(self.rewards_of_turns(invalid_action_penalty))

    def known_reward(self, invalid_action_penalty: float = 0.0) -> float | None:
        reward = self.reward(invalid_action_penalty)
        return None if math.isnan(reward) else reward

    @property
    def end(self) -> str:
        """How it ended, in a word."""
        if self.failure is not None:
            return self.failure.kind
        return "success" if self.success else "length" if self.truncated else "stop"

    def messages(self) -> list[dict[str, str]]:
        """For people to read."""
        return [
            {"role": role, "content": text}
            for turn in self.turns
            for role, text in (("user", turn.observation), ("assistant", turn.action))
        ]


def observation_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8]) >> 1


@dataclass(frozen=True)
class EpisodeBatch:
    """Groups of episodes as numbers, so that ranks can exchange them. NaN: a reward not known."""

    numbers: tuple[int, ...]  # [P], of the tasks
    rewards: Tensor  # fp64 [P, n], of whole episodes
    completions: Completions  # of those that have tokens: [T], [N]
    kept: Tensor  # int64 [N], their places among all P·n episodes
    turns: Tensor  # int64 [N], how many each has: K in all
    step_rewards: Tensor  # fp64 [K]
    observations: Tensor  # int64 [K], hashes
    turn: Tensor  # int64 [T], which of its episode's turns wrote a token, or NOT_WRITTEN

    @staticmethod
    def of(
        episodes: Sequence[Episode],
        invalid_action_penalty: float = 0.0,
        *,
        per_task: int | None = None,  # n, where there may be no episode at all
        device: torch.device | str = "cpu",
    ) -> EpisodeBatch:
        ordered = sorted(episodes, key=lambda episode: episode.group)  # stable
        sizes = Counter(episode.group for episode in ordered)
        n = per_task or max(sizes.values(), default=0)
        if not n or set(sizes.values()) - {n}:
            raise ValueError(
                f"episodes: tasks have {sorted(set(sizes.values()))} episodes; each must have as "
                "many as the others, and there must be some"
            )
        begun = [(i, e, e.trajectory) for i, e in enumerate(ordered) if e.trajectory is not None]
        for _, episode, made in begun:
            if len(made.reasons) != len(episode.turns):
                raise ValueError(
                    f"episodes: sequence {episode.sequence_id} has {len(made.reasons)} turns of "
                    f"tokens and {len(episode.turns)} of rewards"
                )
        taken = [e.rewards_of_turns(invalid_action_penalty) for e in ordered]
        for episode, values in zip(ordered, taken, strict=True):
            if episode.failure is not None:
                values[:] = [math.nan] * len(values)
        rewards = [episode.reward(invalid_action_penalty) for episode in ordered]
        steps = [value for place, _, _ in begun for value in taken[place]]

        def ids(values: Iterable[int]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.int64, device=device)

        return EpisodeBatch(
            tuple(sizes),
            torch.tensor(rewards, dtype=torch.float64, device=device).view(-1, n),
            _completions([made for _, _, made in begun], [e for _, e, _ in begun], device),
            ids(place for place, _, _ in begun),
            ids(len(e.turns) for _, e, _ in begun),
            torch.tensor(steps, dtype=torch.float64, device=device),
            ids(observation_hash(turn.observation) for _, e, _ in begun for turn in e.turns),
            torch.cat([ids(()), *(made.turn.to(device) for _, _, made in begun)]),
        )

    @property
    def groups(self) -> Tensor:
        """int64 [N], which of the P tasks each sequence is of."""
        return self.kept // self.rewards.shape[1]

    @property
    def episode_of_turn(self) -> Tensor:
        """int64 [K], place among all episodes."""
        return self.kept.repeat_interleave(self.turns)

    @property
    def turn_of_token(self) -> Tensor:
        """int64 [T], which of the K turns wrote it, or NOT_WRITTEN."""
        first = (self.turns.cumsum(0) - self.turns)[self.completions.sequence_of_token]
        return (self.turn + first).where(self.turn != NOT_WRITTEN, NOT_WRITTEN)

    def chosen(self, which: Sequence[int]) -> EpisodeBatch:
        """The tasks at these places, in this order."""
        n, device = self.rewards.shape[1], self.rewards.device
        tasks = torch.tensor(which, dtype=torch.int64, device=device)
        episodes = (tasks[:, None] * n + torch.arange(n, device=device)).reshape(-1)
        place = torch.full((self.rewards.numel(),), -1, device=device)
        place[self.kept] = torch.arange(len(self.kept), device=device)
        rows = place[episodes]
        kept = (rows >= 0).nonzero().flatten()
        rows = rows[kept]
        turns = places_of(self.turns, rows)
        return EpisodeBatch(
            tuple(self.numbers[i] for i in which),
            self.rewards[tasks],
            select(self.completions, rows),
            kept,
            self.turns[rows],
            self.step_rewards[turns],
            self.observations[turns],
            self.turn[places_of(self.completions.lengths, rows)],
        )

    @staticmethod
    def joined(parts: Sequence[EpisodeBatch]) -> EpisodeBatch:
        """All of them, in the order of their tasks' numbers."""
        before = [0, *itertools.accumulate(part.rewards.numel() for part in parts)]
        made = [part.completions for part in parts]
        present = [f.name for f in fields(made[0]) if getattr(made[0], f.name) is not None]
        together = EpisodeBatch(
            tuple(number for part in parts for number in part.numbers),
            torch.cat([part.rewards for part in parts]),
            Completions(**{k: torch.cat([getattr(m, k) for m in made]) for k in present}),
            torch.cat([part.kept + b for part, b in zip(parts, before[:-1], strict=True)]),
            *(
                torch.cat([getattr(part, name) for part in parts])
                for name in ("turns", "step_rewards", "observations", "turn")
            ),
        )
        order = sorted(range(len(together.numbers)), key=lambda i: together.numbers[i])
        return together if order == list(range(len(order))) else together.chosen(order)

    def gathered(self, group: Group) -> EpisodeBatch:
        """The episodes of all ranks, in the order of their tasks' numbers."""
        if group.size == 1:
            return EpisodeBatch.joined([self])
        numbers = gather_values(list(self.numbers), group)
        first = sum(map(len, numbers[: group.rank])) * self.rewards.shape[1]
        every = EpisodeBatch(
            tuple(number for of_rank in numbers for number in of_rank),
            gather_ragged(self.rewards, group),
            gather_completions(self.completions, group),
            *(
                gather_ragged(values, group)
                for values in (
                    *(self.kept + first, self.turns),
                    *(self.step_rewards, self.observations, self.turn),
                )
            ),
        )
        return EpisodeBatch.joined([every])

    def token_advantages(self, policy: PolicyConfig) -> Tensor:
        """[T], 0 where not written: of a token's episode or, if the advantage compares turns, of
        its turn."""
        if compares_turns(policy):
            turns = Turns(
                self.rewards,
                self.episode_of_turn,
                self.episode_of_turn // self.rewards.shape[1],
                self.observations,
                self.step_rewards,
            )
            of_turn = turn_advantages(policy, turns)
        else:
            of_turn = sample_advantages(policy, self.rewards).flatten()[self.episode_of_turn]
        return of_turn[self.turn_of_token.clamp_min(0)].where(self.turn != NOT_WRITTEN, 0)


def metrics_of(
    episodes: Sequence[Episode], label: str, invalid_action_penalty: float = 0.0
) -> dict[str, tuple[float, int]]:
    """(sum, count) of each, so that ranks can add theirs up before dividing."""
    known = [episode for episode in episodes if episode.failure is None]
    turns = [turn for episode in known for turn in episode.turns]
    rewards = [r for e in known for r in e.rewards_of_turns(invalid_action_penalty)]
    solved = (sum(e.success for e in known), len(known))
    return {
        "rl/reward": (math.fsum(rewards), len(known)),
        "rl/pass_at_1": solved,
        f"rl/success_{label}": solved,
        f"rl/valid_actions_{label}": (sum(t.valid for t in turns), len(turns)),
        f"rl/turns_{label}": (len(turns), len(known)),
        f"rl/truncated_{label}": (sum(e.truncated for e in known), len(known)),
        f"rl/environment_failures_{label}": (len(episodes) - len(known), 1),
    }


def _completions(
    trajectories: Sequence[Trajectory], episodes: Sequence[Episode], device: torch.device | str
) -> Completions:
    def row(values: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
        return torch.cat([torch.zeros(0, dtype=dtype), *values]).to(device)

    lengths = [len(t.tokens) for t in trajectories]
    return Completions(
        row((t.tokens for t in trajectories), torch.int64),
        torch.tensor(lengths, dtype=torch.int64, device=device),
        row((t.written for t in trajectories), torch.bool),
        # of the policy that is trained, at its temperature
        rollout_logprobs=row((t.sampled_logprobs for t in trajectories), torch.float32),
        truncated=torch.tensor([e.truncated for e in episodes], dtype=torch.bool, device=device),
    )


def stop_if_too_many_failed(
    config: EnvironmentConfig, episodes: Sequence[Episode], group: Group | None = None
) -> None:
    """With a group, all its ranks call this together, and stop together."""
    failed = [episode for episode in episodes if episode.failure is not None]
    table = torch.tensor([len(failed), len(episodes)])
    if group is not None:
        table = all_reduce_(table, group)
    count, total = table.tolist()
    if count <= config.allowed_failures * total:
        return
    message = (
        f"environment {config.function}: lost {count} of {total} episodes; allowed are "
        f"{config.allowed_failures:.0%}"
    )
    if failed:
        # Those that nobody asked any more tell no reason.
        asked = (e for e in failed if e.failure is not None and e.failure.kind != "not_asked")
        first = next(asked, failed[0])
        assert first.failure is not None
        message += f". The first ({first.failure.kind}: {first.failure.detail})"
        if first.turns:
            last = first.turns[-1]
            message += f" did {last.action[:SHOWN]!r} where it saw {last.observation[:SHOWN]!r}"
    raise BrokenEnvironment(message)
