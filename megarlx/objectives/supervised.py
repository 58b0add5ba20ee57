"""Next-token prediction: `pretraining` on all tokens, `sft` on the answers' only.

They differ in their dataset and in nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megarlx.comm.groups import Group
from megarlx.data.loader import Batch as Part
from megarlx.data.loader import Loader
from megarlx.objectives.interface import Batch, Objective
from megarlx.ops import Head, LossInputs, LossSpec, TokenLoss
from megarlx.parallel.microbatches import Microbatch


class Supervised(Objective):
    """What a loader deals out, as micro-batches of one shape."""

    def __init__(
        self,
        name: str,
        loader: Loader,
        *,
        device: torch.device | str = "cpu",
        z_loss: float = 0.0,
    ) -> None:
        self.name, self.loader, self.device = name, loader, torch.device(device)
        self.spec = LossSpec("nll", z_loss=z_loss)

    @property
    def fixed_shapes(self) -> bool:  # type: ignore[override]
        """Who derives from this class may have another loss."""
        return type(self).loss is Supervised.loss

    def set_groups(self, training_group: Group, generation_group: Group) -> None:
        self.loader.deal_to(training_group.rank, training_group.size)

    def next_batch(self) -> Batch:
        parts = self.loader.next_step()
        counted = [p.targets.numel() if p.mask is None else int(p.mask.sum()) for p in parts]
        return Batch(
            [self._microbatch(part) for part in parts],
            weight=torch.full((), sum(counted), dtype=torch.float64, device=self.device),
            tokens=sum(part.targets.numel() for part in parts),
        )

    def _microbatch(self, part: Part) -> Microbatch:
        rows, length = part.inputs.shape
        offsets = part.cu_seqlens
        if offsets is None:
            offsets = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32)
        mask = None if part.mask is None else self._sent(part.mask)
        return Microbatch(
            self._sent(part.inputs),
            LossInputs(self._sent(part.targets), mask),
            self._sent(offsets),
            int(offsets.diff().max()),
        )

    def _sent(self, field: Tensor) -> Tensor:
        return field.to(self.device, non_blocking=True)

    def loss(self, head: Head, inputs: LossInputs, normalizer: Tensor) -> TokenLoss:
        return self._loss(head, inputs, normalizer, drop_masked=True)

    def fixed_shape_loss(self, head: Head, inputs: LossInputs, normalizer: Tensor) -> TokenLoss:
        return self._loss(head, inputs, normalizer, drop_masked=False)

    def _loss(
        self, head: Head, inputs: LossInputs, normalizer: Tensor, *, drop_masked: bool
    ) -> TokenLoss:
        return head.token_loss(
            inputs,
            self.spec,
            normalizer=normalizer,
            as_it_is=self.fixed_shapes,
            drop_masked=drop_masked,
        )

    def metrics(self) -> dict[str, float]:
        consumed = self.loader.consumed_sequences
        counts = self.loader.dataset.tokens_by_source(consumed)
        return {f"data/{source}_tokens": float(count) for source, count in counts.items()}

    def state(self) -> dict[str, Any]:
        return self.loader.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.loader.load_state(state)

    def close(self) -> None:
        self.loader.close()
