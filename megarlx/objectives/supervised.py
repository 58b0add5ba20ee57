"""Next-token prediction: `pretraining` on all tokens, `sft` on the answers' only.

They differ in their dataset and in nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megarlx.comm.groups import Group
from megarlx.data.loader import Loader
from megarlx.objectives.interface import Batch, Objective
from megarlx.ops import LossSpec, TokenLoss, linear_token_loss


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

    def deal_over(self, trainers: Group, makers: Group) -> None:
        self.loader.deal_to(trainers.rank, trainers.size)

    def next_batch(self) -> Batch:
        parts = self.loader.next_step()
        targets = torch.cat([part.targets for part in parts])
        documents = _stacked([self._offsets(p.cu_seqlens, *p.inputs.shape) for p in parts])
        fields = {
            "tokens": torch.cat([part.inputs for part in parts]),
            "targets": targets,
            "documents": documents,
        }
        # Where every token counts there is no mask: nobody need look through one on the device.
        masks = [part.mask for part in parts if part.mask is not None]
        counted: Tensor | None = None
        if masks:
            fields["mask"] = torch.cat(masks)
            counted = fields["mask"].sum(dtype=torch.float64)
        inputs = {name: self._sent(field) for name, field in fields.items()}
        everything = torch.full((), targets.numel(), dtype=torch.float64, device=self.device)
        return Batch(
            {**inputs, "longest": int(documents.diff().max())},
            microbatches=len(parts),
            weight=everything if counted is None else self._sent(counted),
            tokens=targets.numel(),
        )

    def _sent(self, field: Tensor) -> Tensor:
        return field.to(self.device, non_blocking=True)

    @staticmethod
    def _offsets(cu_seqlens: Tensor | None, rows: int, length: int) -> Tensor:
        if cu_seqlens is not None:
            return cu_seqlens
        return torch.arange(0, (rows + 1) * length, length, dtype=torch.int32)

    def loss(self, hidden: Tensor, weight: Tensor, **fields: Any) -> TokenLoss:
        targets = fields.pop("targets")
        return linear_token_loss(hidden, weight, targets, self.spec, **fields)

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


def _stacked(offsets: list[Tensor]) -> Tensor:
    """Micro-batches with fewer documents than others get empty ones at their end."""
    most = max(map(len, offsets))
    return torch.stack([torch.cat((o, o[-1:].expand(most - len(o)))) for o in offsets])
