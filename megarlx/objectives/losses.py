"""Policy losses by name, and from a configuration to the loss of a run.

reinforce, ppo_clip and cispo look at single tokens and stand beside the native ops that have them
too. With the log-prob lp, the ratio r = exp(lp - old) and the sequence's ratio
s = exp(mean of lp - old over its learned tokens):

gspo           ppo_clip of s in each of its tokens, with the gradient s · ∇lp of that token
sapo           -(4 / τ) σ(τ (r - 1)) A, τ = sapo_temperatures for positive and for other advantages
sequence_mask  wraps any of them: bad sequences that became unlikely have the advantage 0

Letters: n tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megarlx import plug
from megarlx.config.policy import PolicyConfig
from megarlx.ops import LossSpec
from megarlx.ops.loss_seam import objectives
from megarlx.ops.policy_loss import (
    NATIVE,
    LossTokens,
    PolicyLoss,
    cispo,
    clipped,
    policy_loss,
    ppo_clip,
    ratio,
    reinforce,
    sequence_mean,
)

__all__ = [
    "LossTokens", "PolicyLoss", "cispo", "clipped", "gspo", "policy_loss", "ppo_clip", "ratio",
    "reinforce", "sapo", "sequence_mean",
]  # fmt: skip


@policy_loss(needs="sequence", metrics=("clip_fraction",))
def gspo(t: LossTokens, logprob: Tensor, entropy: Tensor, c: Any) -> Any:
    now = logprob.detach()
    mean = sequence_mean(t, now - t.old)
    # exp(mean) would have the same value, and a wrong gradient where a sequence's advantages differ
    return clipped(ratio(mean + (logprob - now), 0.0), t.advantages, c)


@policy_loss()
def sapo(t: LossTokens, logprob: Tensor, entropy: Tensor, c: Any) -> Tensor:
    r = ratio(logprob, t.old)
    positive, other = (r.new_full((), value) for value in c.sapo_temperatures)
    steepness = torch.where(t.advantages > 0, positive, other)
    return -4 / steepness * torch.sigmoid(steepness * (r - 1)) * t.advantages


def without_fallen(loss: PolicyLoss) -> PolicyLoss:
    """The loss without sequences of negative advantage whose mean log-ratio is below -sequence_mask
    (tokens of negative advantage, where a sequence's turns differ)."""

    def kept(t: LossTokens, logprob: Tensor, entropy: Tensor, c: Any) -> Any:
        sampled = t.old if t.rollout is None else t.rollout
        fallen = sequence_mean(t, sampled - logprob.detach()) > c.sequence_mask
        advantages = t.advantages.masked_fill(fallen & (t.advantages < 0), 0)
        return loss(replace(t, advantages=advantages), logprob, entropy, c)

    return PolicyLoss(kept, True, loss.metrics, loss.name)


def loss_spec(config: PolicyConfig) -> LossSpec:
    loss = PolicyLoss.of(plug.resolve("loss", config.loss))
    if config.sequence_mask is not None:
        loss = without_fallen(loss)
    native = next((name for name, one in NATIVE.items() if one is loss), None)
    return LossSpec(
        mode=native or loss,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip if native == "ppo_clip" else 0.0,
        kl=config.kl_of_loss,
        kl_coefficient=0.0 if config.kl_of_loss == "none" else config.kl_coefficient,
        entropy_coefficient=config.entropy_coefficient,
        settings=None if native else config.settings(),
    )


class LossError(ValueError):
    """A policy loss that cannot be trained with."""


def try_loss(spec: LossSpec, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Calls it on made-up tokens, twice, whole and in halves, before a run depends on it."""
    if spec.is_native:
        return
    try:
        first, again = (_tried(spec, dtype, device, slice(None)) for _ in range(2))
        halves = [_tried(spec, dtype, device, half) for half in _halves(spec)]
    except Exception as error:  # whatever a user's function raises
        wrong = f"{type(error).__name__}: {error}"
        raise LossError(f"policy loss {spec.loss.name}, on made-up tokens: {wrong}") from error
    problem = None
    if not first[1:].any() or not first.isfinite().all():
        problem = "has no gradient, or values that are not finite; it needs one by the log-prob"
    elif not torch.equal(first, again):
        problem = "gives other numbers when it is called again; it may draw no random numbers"
    else:
        whole = torch.cat([first[:, half] for half in _halves(spec)], 1)
        if not torch.allclose(torch.cat(halves, 1), whole, rtol=1e-4, atol=1e-6):
            unit = "sequence" if spec.loss.needs_sequence else "token"
            problem = (
                f"gives a {unit} other numbers when others are left out; it may look at no other "
                "sequence, and with needs='sequence' at other tokens of the same one"
            )
    if problem:
        raise LossError(f"policy loss {spec.loss.name}, on made-up tokens: {problem}")


TOKENS, SEQUENCES = 24, 4  # made up


def _halves(spec: LossSpec) -> list[Tensor]:
    at = torch.arange(TOKENS)
    odd = at * SEQUENCES // TOKENS % 2 if spec.loss.needs_sequence else at % 2
    return [(odd == half).nonzero()[:, 0] for half in (0, 1)]


def _tried(
    spec: LossSpec, dtype: torch.dtype, device: torch.device | str, which: Tensor | slice
) -> Tensor:
    """[3, tokens]: objectives and their derivatives by log-prob and entropy."""
    at = torch.arange(TOKENS, dtype=dtype, device=device)

    def made(factor: float, spread: float) -> Tensor:
        return (factor * (at + 1)).sin() * spread

    logprob = -1.5 - made(0.7, 1.0)
    index = which.to(device) if isinstance(which, Tensor) else which
    t = LossTokens(
        advantages=made(1.9, 1.5)[index],
        old=(logprob + made(1.3, 0.5))[index],
        rollout=(logprob + made(2.3, 0.5))[index],
        reference=(logprob + made(3.1, 0.5))[index],
        sequence=(torch.arange(TOKENS, device=device) * SEQUENCES // TOKENS)[index],
        sequences=SEQUENCES,
    )
    if not spec.loss.needs_sequence:
        t = replace(t, sequence=None, sequences=0)
    if spec.kl == "none":
        t = replace(t, reference=None)
    entropy = (2 + made(0.9, 1.0))[index]
    with torch.no_grad():
        found = objectives(spec, t, logprob[index], entropy, torch.ones_like(entropy))
    return torch.stack(found[:3]).cpu()
