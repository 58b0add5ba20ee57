"""What the trainer knows of an objective: where its batches come from and what its loss is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from megarlx.comm.groups import Group
from megarlx.ops import Head, LossInputs, TokenLoss
from megarlx.parallel.microbatches import Microbatch


@dataclass(frozen=True)
class Batch:
    """One step's micro-batches of this data-parallel rank.

    Their tokens all have one shape. `weight` is this rank's part of what the loss is divided by
    (its number of valid tokens, say); the trainer sums it over all ranks, and nobody else divides
    by anything.
    """

    microbatches: Sequence[Microbatch]
    weight: Tensor
    tokens: int


@dataclass
class Work:
    """What an objective has computed beside training on its batches, on all ranks together."""

    generated_tokens: float = 0.0
    forward_tokens: float = 0.0  # prompts read, and passes for log-probs


class Objective(ABC):
    """`pretraining`, `sft`, `rl`: all of them are this, and the trainer names none."""

    name: str
    # Whether its micro-batches, and what `fixed_shape_loss` makes of them, have shapes that depend
    # on no data: then a small model's can be captured as CUDA graphs.
    fixed_shapes: bool = False

    @cached_property
    def work(self) -> Work:
        return Work()

    waited_seconds = 0.0  # for other replicas, while samples were made; the trainer takes it

    def set_groups(self, training_group: Group, generation_group: Group) -> None:  # noqa: B027
        """Called when a stage begins. `training_group` splits each training batch,
        `generation_group` splits generation; all its ranks hold the same weights."""

    def prepare(self) -> None:  # noqa: B027 - most have nothing to prepare
        """Called on all ranks of the generation group. Makes what the next batch is made of; the
        training group then asks for the batch."""

    @abstractmethod
    def next_batch(self) -> Batch:
        """The batch of the next step: a function of `state` and, for samples, of the weights."""

    @abstractmethod
    def loss(self, head: Head, inputs: LossInputs, normalizer: Tensor) -> TokenLoss:
        """Runs inside the last stage's forward; usually head.token_loss(…) with a LossSpec."""

    def fixed_shape_loss(self, head: Head, inputs: LossInputs, normalizer: Tensor) -> TokenLoss:
        """The same loss to rounding, whatever it costs, where `fixed_shapes` is set."""
        return self.loss(head, inputs, normalizer)

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """As JSON, what a resumed run needs to go on with the same batches."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Any]) -> None: ...

    def begin(self, weights: Tensor, inherit: bool) -> Tensor | None:
        """Called when a stage begins with these weights (this rank's shard). What the objective
        keeps of them, a reference policy say, it returns: that is saved with the run."""
        return None

    def signal(self) -> float | None:
        """How much the last batch had to teach, in [0, 1]; None: its loss tells."""
        return None

    def metrics(self) -> dict[str, float]:
        """Means over the steps since the last call. All ranks call it together and get the same."""
        return {}

    def new_examples(self) -> list[dict[str, Any]]:
        """New samples for the log, each returned once, on the first rank of each replica: prompt,
        completion, reference, reward, finish_reason."""
        return []

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Nobody will ask for another batch."""
