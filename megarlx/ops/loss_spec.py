"""What a token loss computes: LossSpec (the formula), TokenLoss (the result)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch

from megarlx.ops.policy_loss import NATIVE, PolicyLoss

MODES = tuple(NATIVE)
KL_ESTIMATORS = ("none", "k1", "k2", "k3")

# The rows of TokenLoss.metrics, before those that a policy loss declares. All but the largest ratio
# are sums over the unmasked tokens, unweighted; clip_fraction is the number of clipped ones.
METRICS = ("tokens", "clip_fraction", "kl", "old_kl", "ratio", "nll", "entropy", "ratio_max")


def refuse(op: str, argument: str, value: Any, allowed: str) -> NoReturn:
    raise ValueError(f"megarlx.{op}: {argument} is {value}; allowed: {allowed}")


NUMBERS = (
    *("clip_low", "clip_high", "dual_clip"),
    *("kl_coefficient", "entropy_coefficient", "z_loss"),
)


@dataclass(frozen=True)
class LossSpec:
    """The loss of a token, with lp = log p(target) and the ratio r = exp(lp - old_logprob).

    mode          objective; or a function (policy_loss.py), which gets `settings` as its c
    `nll`         -lp
    `reinforce`   -A lp
    `ppo_clip`    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A); with dual_clip c > 1, and
                  A < 0, at most -c A
    `cispo`       -clip(r, 1 - clip_low, 1 + clip_high) A lp, the clipped ratio being a constant

    kl            with g = ref_logprob - lp, added kl_coefficient times; differentiated as written
    `k1`          -g
    `k2`          g² / 2
    `k3`          exp(g) - 1 - g

    entropy_coefficient times the entropy of the token's whole distribution is subtracted, and
    z_loss times the square of log Σ exp(logits / temperature) is added.
    Log-ratios are limited to ±80, so that exponentials stay finite.
    """

    mode: str | PolicyLoss = "nll"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0  # 0: none
    kl: str = "none"
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0
    z_loss: float = 0.0
    settings: Any = None  # of a function

    def __post_init__(self) -> None:
        if not isinstance(self.mode, PolicyLoss) and self.mode not in MODES:
            allowed = f"{', '.join(MODES)}, or a policy loss"
            refuse("LossSpec", "mode", repr(self.mode), allowed)
        if self.kl not in KL_ESTIMATORS:
            refuse("LossSpec", "kl", repr(self.kl), ", ".join(KL_ESTIMATORS))
        for name in NUMBERS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                refuse("LossSpec", name, repr(value), "a number")
            if math.isnan(value) or (math.isinf(value) and name != "clip_high"):
                refuse("LossSpec", name, value, "a finite number")
        for name in ("clip_low", "clip_high", "z_loss"):
            if getattr(self, name) < 0:
                refuse("LossSpec", name, getattr(self, name), "a number >= 0")
        if self.dual_clip != 0 and self.dual_clip <= 1:
            refuse("LossSpec", "dual_clip", self.dual_clip, "0 (none) or a number > 1")
        if self.kl == "none" and self.kl_coefficient != 0:
            allowed = "0 when kl is 'none'"
            refuse("LossSpec", "kl_coefficient", self.kl_coefficient, allowed)

    @property
    def arguments(self) -> tuple[str | float, ...]:
        """In the order of the native ops."""
        assert isinstance(self.mode, str)
        return (self.mode, self.kl, *(float(getattr(self, name)) for name in NUMBERS))

    @property
    def is_native(self) -> bool:
        """Whether the native ops have the whole formula."""
        return isinstance(self.mode, str)

    @property
    def loss(self) -> PolicyLoss:
        return NATIVE[self.mode] if isinstance(self.mode, str) else self.mode

    @property
    def c(self) -> Any:
        """What the function gets as its settings."""
        return self if self.settings is None else self.settings

    @property
    def metrics(self) -> tuple[str, ...]:
        """The rows of TokenLoss.metrics."""
        own = () if self.is_native else self.loss.metrics
        return (*METRICS, *(name for name in own if name not in METRICS))


class TokenLoss(NamedTuple):
    """Only `loss` is differentiable. Masked tokens have log-prob and entropy 0."""

    loss: torch.Tensor  # 0-dim, fp32 (fp64 for fp64 inputs) like the others
    logprobs: torch.Tensor  # [tokens], log p(target) at the given temperature
    entropy: torch.Tensor  # [tokens], of the whole distribution at that temperature
    metrics: torch.Tensor  # [8] or more, see LossSpec.metrics
