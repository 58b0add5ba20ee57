"""Outer steps: an average of local steps taken as a gradient, with momentum and a rate of its own.

With Δ what the average adds to the master θ̄, and v = 0 at a stage's begin:

    v ← momentum · v + Δ,   θ̄ ← θ̄ + rate · (Δ + momentum · v)

That is Nesterov's momentum as SGD has it for the gradient -Δ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megarlx.checkpoint import OPTIMIZER


@dataclass(frozen=True)
class Outer:
    momentum: float
    rate: float


class OuterSteps:
    def __init__(self, outer: Outer, master: Tensor) -> None:
        self.outer, self.velocity = outer, torch.zeros_like(master)

    def named(self) -> dict[str, Tensor]:
        """Under the name that checkpoints have for it; no objective may be called outer."""
        return {f"{OPTIMIZER}outer/velocity/": self.velocity}

    def move_(self, master: Tensor, before: Tensor) -> None:
        """From the plain average, which `master` has become, to the outer step; uses `before` up.

        What is added is 0 with momentum 0 and rate 1, so that these are plain averaging.
        """
        momentum, rate = self.outer.momentum, self.outer.rate
        delta = before.neg_().add_(master)
        self.velocity.mul_(momentum).add_(delta)
        master.add_(delta.mul_(rate - 1).add_(self.velocity, alpha=rate * momentum))
