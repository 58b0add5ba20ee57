"""Episodes as what a policy loss is made of: one sequence each, of which it wrote the turns.

An episode's reward is the sum of its turns' rewards, an invalid turn's less the penalty. With a
single turn everything here comes to what is done with a prompt and its completion.

Letters: P tasks, n episodes of each, N episodes that have tokens, T their tokens, K their turns.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megarlx.comm.collectives import all_reduce_
from megarlx.comm.groups import Group
from megarlx.config.environment import EnvironmentConfig
from megarlx.generation.episodes import NOT_WRITTEN, Trajectory
from megarlx.objectives.advantages import gigpo, grpo
from megarlx.objectives.environment_process import BrokenEnvironment, Failure
from megarlx.objectives.policy_loss import Completions

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

    @property
    def truncated(self) -> bool:
        """Ended by a limit of tokens."""
        made = self.trajectory
        return made is not None and (made.full or made.reasons[-1] == "length")

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
    """`episodes` in the order of their tasks. NaN is a reward that is not known."""

    episodes: tuple[Episode, ...]
    rewards: Tensor  # fp32 [P, n], of whole episodes
    completions: Completions  # of those that have tokens: [T], [N]
    kept: Tensor  # int64 [N], their places among all episodes
    step_rewards: Tensor  # fp32 [K]
    episode_of_turn: Tensor  # int64 [K], place among all episodes
    observations: Tensor  # int64 [K], hashes
    turn_of_token: Tensor  # int64 [T], which of the K turns wrote it, or NOT_WRITTEN

    @staticmethod
    def of(episodes: Sequence[Episode], invalid_action_penalty: float = 0.0) -> EpisodeBatch:
        ordered = sorted(episodes, key=lambda episode: episode.group)  # stable
        sizes = Counter(episode.group for episode in ordered)
        if not ordered or len(set(sizes.values())) > 1:
            raise ValueError(
                f"episodes: tasks have {sorted(set(sizes.values()))} episodes; each must have as "
                "many as the others, and there must be some"
            )
        rewards: list[float] = []
        step_rewards: list[float] = []
        episode_of_turn, observations, kept, turn_of_token = [], [], [], []
        for place, episode in enumerate(ordered):
            taken = [t.reward - (0 if t.valid else invalid_action_penalty) for t in episode.turns]
            lost = episode.failure is not None
            rewards.append(math.nan if lost else math.fsum(taken))
            made = episode.trajectory
            if made is None:
                continue
            if len(made.reasons) != len(taken):
                raise ValueError(
                    f"episodes: sequence {episode.sequence_id} has {len(made.reasons)} turns of "
                    f"tokens and {len(taken)} of rewards"
                )
            kept.append(place)
            written = made.turn != NOT_WRITTEN
            turn_of_token.append(made.turn + len(step_rewards) * written)
            step_rewards += [math.nan] * len(taken) if lost else taken
            episode_of_turn += [place] * len(taken)
            observations += [observation_hash(turn.observation) for turn in episode.turns]
        trajectories = [ordered[place].trajectory for place in kept]
        return EpisodeBatch(
            tuple(ordered),
            torch.tensor(rewards, dtype=torch.float32).view(len(sizes), -1),
            _completions([t for t in trajectories if t is not None], [ordered[k] for k in kept]),
            torch.tensor(kept),
            torch.tensor(step_rewards, dtype=torch.float32),
            torch.tensor(episode_of_turn, dtype=torch.int64),
            torch.tensor(observations, dtype=torch.int64),
            torch.cat(turn_of_token),
        )

    def token_advantages(
        self,
        advantage: Callable[[Tensor], Tensor] = grpo,
        *,
        omega: float = 0.0,
        gamma: float = 0.95,
    ) -> Tensor:
        """[T], 0 where not written: of a token's episode and, with `omega`, omega times that of its
        turn among the turns of its task that saw the same (gigpo)."""
        of_episode = advantage(self.rewards).flatten()
        if omega:
            of_turn = gigpo(
                of_episode,
                self.episode_of_turn,
                self.episode_of_turn // self.rewards.shape[1],
                self.observations,
                self.step_rewards,
                gamma=gamma,
                omega=omega,
            )
        else:
            of_turn = of_episode[self.episode_of_turn]
        return of_turn[self.turn_of_token.clamp_min(0)].where(self.turn_of_token != NOT_WRITTEN, 0)

    def metrics(self, label: str) -> dict[str, tuple[float, int]]:
        """(sum, count) of each, so that ranks can add theirs up before dividing."""
        known = [episode for episode in self.episodes if episode.failure is None]
        turns = [turn for episode in known for turn in episode.turns]
        failed = len(self.episodes) - len(known)
        return {
            "rl/reward": (float(self.rewards.nansum()), len(known)),
            f"rl/success_{label}": (sum(e.success for e in known), len(known)),
            f"rl/valid_actions_{label}": (sum(t.valid for t in turns), len(turns)),
            f"rl/turns_{label}": (len(turns), len(known)),
            f"rl/truncated_{label}": (sum(e.truncated for e in known), len(known)),
            f"rl/environment_failures_{label}": (failed, 1),
        }


def _completions(trajectories: Sequence[Trajectory], episodes: Sequence[Episode]) -> Completions:
    if not trajectories:
        raise ValueError("episodes: none of them has begun; there is nothing to learn from")
    return Completions(
        torch.cat([t.tokens for t in trajectories]),
        torch.tensor([len(t.tokens) for t in trajectories]),
        torch.cat([t.written for t in trajectories]),
        rollout_logprobs=torch.cat([t.logprobs for t in trajectories]),
        truncated=torch.tensor([episode.truncated for episode in episodes]),
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
        first = failed[0]
        assert first.failure is not None
        message += f". The first ({first.failure.kind}: {first.failure.detail})"
        if first.turns:
            last = first.turns[-1]
            message += f" did {last.action[:SHOWN]!r} where it saw {last.observation[:SHOWN]!r}"
    raise BrokenEnvironment(message)
