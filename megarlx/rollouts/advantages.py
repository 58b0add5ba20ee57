"""How much better a sample was than its group: pure functions of the rewards.

An advantage is (rewards [P, n], c) -> [P, n], with the settings of [rl.policy] as its c. One that
compares the turns of episodes has the attribute `turns = True`, and is (t, c) -> [K] of Turns.

Letters: P prompts, n samples of each (a group), K turns of all episodes.
A reward of NaN is a sample that was not scored: it counts nowhere, and its advantage is 0. So is
every advantage of an uninformative group, exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megarlx import plug
from megarlx.config.policy import PolicyConfig

# Added to a standard deviation before dividing by it. Rewards are of the order of 1, so it changes
# an advantage by about one part in ten thousand, and a group that differs by rounding alone is not
# blown up to advantages of 1.
STD_FLOOR = 1e-4
# Rewards closer than this are equal: they are sums of weighted parts, and sums round.
EQUAL = 1e-6


@dataclass(frozen=True)
class Turns:
    """What an advantage of turns knows of them."""

    rewards: Tensor  # [P, n], of the episodes
    episodes: Tensor  # int64 [K], which one a turn is of
    groups: Tensor  # int64 [K], its task
    observations: Tensor  # int64 [K], a hash of what was seen
    step_rewards: Tensor  # [K], of each turn alone


def advantage_of(policy: PolicyConfig) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = plug.resolve("advantage", policy.advantage)
    return found


def compares_turns(policy: PolicyConfig) -> bool:
    return bool(getattr(advantage_of(policy), "turns", False))


def sample_advantages(policy: PolicyConfig, rewards: Tensor) -> Tensor:
    """[P, n] -> [P, n]; 0 where the reward is not known."""
    _check(rewards)
    found = advantage_of(policy)(rewards, policy.settings())
    _check_shape(policy, found, rewards.shape)
    return found.where(rewards.isfinite(), 0)


def turn_advantages(policy: PolicyConfig, turns: Turns) -> Tensor:
    """[K]"""
    found = advantage_of(policy)(turns, policy.settings())
    _check_shape(policy, found, turns.episodes.shape)
    return found


def uninformative(rewards: Tensor) -> Tensor:
    """[P, n] -> bool [P]: all scored rewards equal, or fewer than two scored: nothing to learn."""
    _check(rewards)
    scored = rewards.isfinite()
    highest = rewards.where(scored, -torch.inf).amax(1)
    lowest = rewards.where(scored, torch.inf).amin(1)
    return (scored.sum(1) < 2) | (highest - lowest <= EQUAL)


def grpo(rewards: Tensor, c: Any) -> Tensor:
    """(r - mean) / (std + STD_FLOOR) within each group, std with n - 1 in its denominator."""
    centred, scored = _centred(rewards)
    freedom = (scored.sum(1, keepdim=True) - 1).clamp_min(1)
    std = (centred.square().sum(1, keepdim=True) / freedom).sqrt()
    return _informative(rewards, centred / (std + STD_FLOOR))


def dr_grpo(rewards: Tensor, c: Any) -> Tensor:
    """r - mean: easy and hard groups are not weighted up."""
    return _informative(rewards, _centred(rewards)[0])


def rloo(rewards: Tensor, c: Any) -> Tensor:
    """r - the mean of the other samples of the group."""
    centred, scored = _centred(rewards)
    count = scored.sum(1, keepdim=True)
    return _informative(rewards, centred * count / (count - 1).clamp_min(1))


def maxrl(rewards: Tensor, c: Any) -> Tensor:
    """(r - mean) / mean: with rewards of 0 and 1, the gradient of the log of how often a prompt is
    solved. A mean of 0 gives 0."""
    centred, scored = _centred(rewards)
    if (rewards < 0).any():
        lowest = float(rewards.where(scored, 0).min())
        raise ValueError(f"advantage maxrl: a reward is {lowest:g}; it allows none below 0")
    mean = rewards.where(scored, 0).sum(1, keepdim=True) / scored.sum(1, keepdim=True).clamp_min(1)
    return _informative(rewards, centred / mean.where(mean > 0, 1))


def discounted_returns(rewards: Tensor, episodes: Tensor, gamma: float) -> Tensor:
    """[K] -> [K]: each turn's reward and the discounted ones after it in the same episode.

    The turns of an episode stand in order; those of several episodes may be mixed.
    """
    ahead: dict[int, float] = {}
    returns = []
    for reward, episode in zip(
        reversed(rewards.tolist()), reversed(episodes.tolist()), strict=True
    ):
        ahead[episode] = reward + gamma * ahead.get(episode, 0.0)
        returns.append(ahead[episode])
    return torch.tensor(returns[::-1], dtype=rewards.dtype, device=rewards.device)


def step_advantages(returns: Tensor, groups: Tensor, observations: Tensor) -> Tensor:
    """[K]: like `grpo`, over the turns of one task's group that saw the same observation.

    `groups` and `observations` are int64 [K]: the task, and a hash of what was seen. A turn whose
    observation nobody else saw has nothing to be compared with, and gets 0.
    """
    _, anchor = torch.stack((groups, observations)).unique(dim=1, return_inverse=True)
    anchors = int(anchor.max()) + 1 if len(anchor) else 0
    scored = returns.isfinite()
    known = returns.where(scored, 0)

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(anchors).index_add_(0, anchor, values)

    count = total(scored.to(returns.dtype))
    mean = total(known) / count.clamp_min(1)
    centred = (known - mean[anchor]).where(scored, 0)
    std = (total(centred.square()) / (count - 1).clamp_min(1)).sqrt()
    same = std[anchor] <= EQUAL
    return torch.where(same, 0, centred / (std[anchor] + STD_FLOOR))


def gigpo(t: Turns, c: Any) -> Tensor:
    """[K]: grpo of a turn's episode + omega · the advantage of the turn."""
    returns = discounted_returns(t.step_rewards, t.episodes, c.gamma)
    steps = step_advantages(returns, t.groups, t.observations)
    return grpo(t.rewards, c).flatten().to(steps.dtype)[t.episodes] + c.omega * steps


gigpo.turns = True  # type: ignore[attr-defined]


def _check(rewards: Tensor) -> None:
    if rewards.dim() != 2 or not rewards.is_floating_point():
        raise ValueError(
            f"advantages: rewards are {rewards.dtype} of shape {tuple(rewards.shape)}; they must "
            "be floating, [prompts, samples of each]"
        )
    if rewards.isinf().any():
        raise ValueError("advantages: a reward is infinite; NaN marks one that is not known")


def _check_shape(policy: PolicyConfig, found: Any, shape: torch.Size) -> None:
    if not isinstance(found, Tensor) or found.shape != shape:
        given = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"advantage {policy.advantage}: the result is {given}; it must be {list(shape)}"
        )


def _centred(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """(r - the mean of the group's scored rewards, 0 where not scored; whether scored)."""
    _check(rewards)
    scored = rewards.isfinite()
    known = rewards.where(scored, 0)
    mean = known.sum(1, keepdim=True) / scored.sum(1, keepdim=True).clamp_min(1)
    return (known - mean).where(scored, 0), scored


def _informative(rewards: Tensor, advantages: Tensor) -> Tensor:
    return advantages.masked_fill(uninformative(rewards)[:, None], 0)
