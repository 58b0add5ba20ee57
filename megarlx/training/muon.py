"""Muon: momentum made orthogonal, for the matrices of layers; AdamW for the rest.

Of a matrix G of momentum with the singular values s, U s Vᵀ, the update is about U Vᵀ: every
direction moves alike. Its root mean square is made 0.2, about what AdamW's is, so that rates and
weight decays of AdamW stay good.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megarlx.training.parts import Parts, UpdateSettings
from megarlx.training.update_rules import AdamW

# s → a s + b s³ + c s⁵ brings all of (0, 1] near 1 within a few rounds.
QUINTIC = (3.4445, -4.7750, 2.0315)


class Muon:
    state = AdamW.state  # of a matrix: its momentum, and nothing

    def __init__(
        self,
        settings: UpdateSettings,
        momentum: float = 0.95,
        rounds: int = 5,
        root_mean_square: float = 0.2,
    ) -> None:
        if not 0 <= momentum < 1 or rounds < 1 or root_mean_square <= 0:
            raise ValueError(
                f"momentum is {momentum}, rounds is {rounds}, root_mean_square is "
                f"{root_mean_square}; allowed are 0 <= momentum < 1, rounds of 1 or more, and a "
                "root_mean_square above 0"
            )
        self.adamw, self.momentum = AdamW(settings), momentum
        self.rounds, self.root_mean_square = rounds, root_mean_square

    def whole(self, name: str, shape: tuple[int, ...]) -> bool:
        return name.startswith("layers.") and len(shape) == 2

    def delta(
        self,
        parts: Parts,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        lr: Tensor,
        steps: Tensor,
        clip: Tensor,
        found_inf: Tensor,
    ) -> Tensor:
        delta = self.adamw.write(parts.room(), parts, gradient, state, lr, steps, clip, found_inf)
        rate, scale = lr.to(delta.dtype), clip.to(delta.dtype)
        moving = torch.zeros_like(delta)
        matrices = [one for one in parts.ranges if one.whole]
        for part, _, _ in matrices:
            given, kept = gradient[part] * scale, state["exp_avg"][part]
            moved = self.momentum * kept + given
            moving[part] = given + self.momentum * moved  # a step ahead, as Nesterov's
            kept.copy_(torch.where(found_inf, kept, moved))
        directions = parts.on_whole(moving, self.direction)
        for part, decay, _ in matrices:
            update = -rate * (directions[part] + decay * parts.master[part])
            delta[part] = torch.where(found_inf, 0.0, update)
        return delta

    def direction(self, matrix: Tensor) -> Tensor:
        """[m, n] → about U Vᵀ, with the root mean square that is wanted."""
        m, n = matrix.shape
        x = matrix.T if m > n else matrix
        x = x / x.norm().clamp(min=1e-7)
        a, b, c = QUINTIC
        for _ in range(self.rounds):
            square = x @ x.T
            x = a * x + (b * square + c * square @ square) @ x
        # The root mean square of an orthogonal [m, n] is 1 / sqrt(max(m, n)).
        return self.root_mean_square * max(m, n) ** 0.5 * (x.T if m > n else x)
