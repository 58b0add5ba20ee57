"""How an objective's gradient becomes its update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EMBEDDING = "embedding.weight"
Kind = Literal["matrices", "embedding", "vectors"]  # of parameters, by their weight decay


@dataclass(frozen=True)
class UpdateSettings:
    """What does not change from step to step, for one objective."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_embeddings: bool = True
    clip_norm: float | None = 1.0

    def decay_of(self, kind: Kind) -> float:
        if kind == "vectors" or (kind == "embedding" and not self.decay_embeddings):
            return 0.0
        return self.weight_decay
