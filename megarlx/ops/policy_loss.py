"""A policy loss: a function in plain torch from the log-probs of tokens to their objectives.

    @policy_loss(metrics=("clip_fraction",))
    def mine(t, logprob, entropy, c):
        r = ratio(logprob, t.old)
        return -r.clamp_max(c.clip_high) * t.advantages, {"clip_fraction": r > c.clip_high}

`logprob` and `entropy` are [n], and only through them does a gradient flow. `t` holds what else is
known of the tokens (LossTokens), `c` the settings. What the function returns is minimised. It
draws no random numbers and waits for no device. The seam that calls it (loss_seam.py) adds KL,
entropy and weights, and leaves masked tokens out.

Letters: n tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

LARGEST_LOG_RATIO = 80.0  # exponentials stay finite in fp32
OF_EVERY_LOSS = ("tokens", "kl", "old_kl", "ratio", "nll", "entropy", "ratio_max")

Settings = Any  # attributes: those of [rl.policy] and of its loss_options
Function = Callable[["LossTokens", Tensor, Tensor, Settings], Any]


@dataclass(frozen=True)
class LossTokens:
    """What a loss knows of its tokens. Masked ones have 0 everywhere and the sequence -1."""

    advantages: Tensor  # [n]
    old: Tensor  # [n], log-probs before the first update; on-policy those of now
    rollout: Tensor | None = None  # [n], the sampler's
    reference: Tensor | None = None  # [n], the reference policy's
    sequence: Tensor | None = None  # int64 [n], which one a token is of, for needs="sequence"
    sequences: int = 0  # no sequence has this number or a larger one


@dataclass(frozen=True)
class PolicyLoss:
    """A function, and what is to be known of it before it is called."""

    function: Function
    needs_sequence: bool = False  # it may look at other tokens of a token's sequence
    metrics: tuple[str, ...] = ()
    name: str = field(default="", compare=False)

    def __call__(self, t: LossTokens, logprob: Tensor, entropy: Tensor, c: Settings) -> Any:
        return self.function(t, logprob, entropy, c)

    @staticmethod
    def of(loss: PolicyLoss | Function) -> PolicyLoss:
        """A plain function is a loss of single tokens without metrics."""
        return loss if isinstance(loss, PolicyLoss) else policy_loss()(loss)


def policy_loss(
    *, needs: Literal["sequence"] | None = None, metrics: tuple[str, ...] = ()
) -> Callable[[Function], PolicyLoss]:
    """`needs="sequence"`: the function looks at whole sequences (t.sequence), not single tokens.

    With `metrics` it returns (objectives, {name: [n]}); their means over learned tokens are logged
    as rl/NAME. They are named here because all pipeline ranks add them up.
    """
    if needs not in (None, "sequence"):
        raise ValueError(f"policy_loss: needs is {needs!r}; allowed: 'sequence', None")
    for name in metrics:
        if name in OF_EVERY_LOSS or not name.isidentifier():
            taken = ", ".join(OF_EVERY_LOSS)
            raise ValueError(
                f"policy_loss: a metric is {name!r}; allowed: an identifier other than {taken}"
            )

    def declared(function: Function) -> PolicyLoss:
        name = getattr(function, "__qualname__", type(function).__name__)
        return PolicyLoss(function, needs == "sequence", tuple(metrics), name)

    return declared


class _Ratio(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor | float) -> Tensor:
        value = (a - b).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
        ctx.save_for_backward(value)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (value,) = ctx.saved_tensors
        slope = upstream * value
        return slope, -slope if ctx.needs_input_grad[1] else None


def ratio(a: Tensor, b: Tensor | float) -> Tensor:
    """exp(a - b), the exponent limited to ±80. Its derivative is its value, also where limited."""
    found: Tensor = _Ratio.apply(a, b)
    return found


def sequence_mean(t: LossTokens, values: Tensor) -> Tensor:
    """[n] -> [n]: the mean over the learned tokens of each token's sequence."""
    assert t.sequence is not None, "declare the loss with needs='sequence'"
    place = t.sequence + 1  # masked tokens stand together at 0
    table = values.new_zeros(2, t.sequences + 1, dtype=torch.float64)
    both = torch.stack((values.double(), torch.ones_like(values, dtype=torch.float64)))
    total, count = table.index_add(1, place, both).unbind()
    return (total / count.clamp_min(1))[place].to(values.dtype)


# The losses that the native ops have too.


@policy_loss()
def nll(t: LossTokens, logprob: Tensor, entropy: Tensor, c: Settings) -> Tensor:
    return -logprob


@policy_loss()
def reinforce(t: LossTokens, logprob: Tensor, entropy: Tensor, c: Settings) -> Tensor:
    return -t.advantages * logprob


def clipped(r: Tensor, advantages: Tensor, c: Settings) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(r A, clip(r) A); dual_clip bounds what an unlikely bad token costs by -dual_clip A."""
    plain = r * advantages
    surrogate = torch.minimum(plain, r.clamp(1 - c.clip_low, 1 + c.clip_high) * advantages)
    if c.dual_clip:
        bounded = torch.maximum(surrogate, c.dual_clip * advantages)
        surrogate = torch.where(advantages < 0, bounded, surrogate)
    return -surrogate, {"clip_fraction": surrogate != plain}


@policy_loss(metrics=("clip_fraction",))
def ppo_clip(t: LossTokens, logprob: Tensor, entropy: Tensor, c: Settings) -> Any:
    return clipped(ratio(logprob, t.old), t.advantages, c)


@policy_loss(metrics=("clip_fraction",))
def cispo(t: LossTokens, logprob: Tensor, entropy: Tensor, c: Settings) -> Any:
    r = ratio(logprob.detach(), t.old)
    used = r.clamp(1 - c.clip_low, 1 + c.clip_high)
    return -used * t.advantages * logprob, {"clip_fraction": used != r}


NATIVE = {"nll": nll, "reinforce": reinforce, "ppo_clip": ppo_clip, "cispo": cispo}
