"""What a token loss computes: LossSpec (the formula), TokenLoss (the result)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch

MODES = ("nll", "reinforce", "ppo_clip", "cispo")
KL_ESTIMATORS = ("none", "k1", "k2", "k3")

# The rows of TokenLoss.metrics. All but the last are sums over the unmasked tokens, unweighted.
METRICS = ("tokens", "clipped", "kl", "old_kl", "ratio", "nll", "entropy", "ratio_max")


def refuse(op: str, argument: str, value: Any, allowed: str) -> NoReturn:
    raise ValueError(f"megarlx.{op}: {argument} is {value}; allowed: {allowed}")


@dataclass(frozen=True)
class LossSpec:
    """The loss of a token, with lp = log p(target) and the ratio r = exp(lp - old_logprob).

    mode          objective
    `nll`         -lp
    `reinforce`   -A lp
    `ppo_clip`    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A); with dual_clip c > 1, and
                  A < 0, at most -c A
    `cispo`       -clip(r, 1 - clip_low, 1 + clip_high) A lp, the clipped ratio being a constant

    kl            with g = ref_logprob - lp, added kl_coefficient times; differentiated as written
    `k1`          -g
    `k2`          g² / 2
    `k3`          exp(g) - 1 - g

    entropy_coefficient times the entropy of the token's whole distribution is subtracted.
    Log-ratios are limited to ±80, so that exponentials stay finite.
    """

    mode: str = "nll"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0  # 0: none
    kl: str = "none"
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            refuse("LossSpec", "mode", repr(self.mode), ", ".join(MODES))
        if self.kl not in KL_ESTIMATORS:
            refuse("LossSpec", "kl", repr(self.kl), ", ".join(KL_ESTIMATORS))
        for name in ("clip_low", "clip_high", "dual_clip", "kl_coefficient", "entropy_coefficient"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                refuse("LossSpec", name, repr(value), "a number")
            if math.isnan(value) or (math.isinf(value) and name != "clip_high"):
                refuse("LossSpec", name, value, "a finite number")
        if self.clip_low < 0 or self.clip_high < 0:
            name = "clip_low" if self.clip_low < 0 else "clip_high"
            refuse("LossSpec", name, getattr(self, name), "a number >= 0")
        if self.dual_clip != 0 and self.dual_clip <= 1:
            refuse("LossSpec", "dual_clip", self.dual_clip, "0 (none) or a number > 1")
        if self.kl == "none" and self.kl_coefficient != 0:
            allowed = "0 when kl is 'none'"
            refuse("LossSpec", "kl_coefficient", self.kl_coefficient, allowed)

    @property
    def arguments(self) -> tuple[str, str, float, float, float, float, float]:
        """In the order of the native ops."""
        return (
            self.mode,
            self.kl,
            float(self.clip_low),
            float(self.clip_high),
            float(self.dual_clip),
            float(self.kl_coefficient),
            float(self.entropy_coefficient),
        )


class TokenLoss(NamedTuple):
    """Only `loss` is differentiable. Masked tokens have log-prob and entropy 0."""

    loss: torch.Tensor  # 0-dim, fp32 (fp64 for fp64 inputs) like the others
    logprobs: torch.Tensor  # [tokens], log p(target) at the given temperature
    entropy: torch.Tensor  # [tokens], of the whole distribution at that temperature
    metrics: torch.Tensor  # [8], see METRICS
