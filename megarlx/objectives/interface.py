"""What the trainer knows of an objective: where its batches come from and what its loss is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One step's micro-batches of this data-parallel rank.

    `inputs` holds "tokens" and the loss's fields; the first dimension of every tensor splits into
    `microbatches`. `weight` is this rank's part of what the loss is divided by (its number of
    valid tokens, say); the trainer sums it over all ranks, and nobody else divides by anything.
    """

    inputs: Mapping[str, Any]
    microbatches: int
    weight: Tensor
    tokens: int


class Objective(Protocol):
    """`pretraining`, `sft`, `rl`: all of them are this, and the trainer names none."""

    name: str

    def next_batch(self) -> Batch:
        """The batch of the next step, a function of `state` alone."""
        ...

    def loss(self, hidden: Tensor, weight: Tensor, **fields: Any) -> Any:
        """Runs inside the last stage's forward, with the signature of `linear_token_loss`."""
        ...

    def state(self) -> dict[str, Any]:
        """As JSON, what a resumed run needs to go on with the same batches."""
        ...

    def load_state(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...
