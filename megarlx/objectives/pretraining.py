"""Next-token prediction over sequences that are known by their index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megarlx.comm.groups import Group
from megarlx.objectives.interface import Batch
from megarlx.ops import LossSpec, TokenLoss, linear_token_loss

# (first, count) -> int64 [count, sequence_length + 1], the samples first, first+1, … of the data
Sequences = Callable[[int, int], Tensor]


class Pretraining:
    """Step s trains on the samples [s·n, (s+1)·n), with n `sequences_per_step`, in any layout."""

    def __init__(
        self,
        sequences: Sequences,
        *,
        sequences_per_step: int,
        sequences_per_microbatch: int,
        data_parallel: Group,
        device: torch.device | str = "cpu",
        name: str = "pretraining",
    ) -> None:
        unit = sequences_per_microbatch * data_parallel.size
        if sequences_per_step % unit or sequences_per_step < unit:
            raise ValueError(
                f"{name}: sequences_per_step is {sequences_per_step}; it must be a multiple of "
                f"sequences_per_microbatch × data-parallel ranks = {sequences_per_microbatch} × "
                f"{data_parallel.size} = {unit}"
            )
        self.name, self.sequences, self.device = name, sequences, device
        self.sequences_per_step, self.group = sequences_per_step, data_parallel
        self.sequences_per_microbatch = sequences_per_microbatch
        self.spec = LossSpec("nll")

    def next_batch(self, step: int) -> Batch:
        mine = self.sequences_per_step // self.group.size
        first = step * self.sequences_per_step + self.group.rank * mine
        samples = self.sequences(first, mine).to(self.device)
        tokens, targets = samples[:, :-1].contiguous(), samples[:, 1:].contiguous()
        microbatches = mine // self.sequences_per_microbatch
        length = tokens.shape[1]
        offsets = torch.arange(
            0, (self.sequences_per_microbatch + 1) * length, length, dtype=torch.int32
        )
        return Batch(
            {
                "tokens": tokens,
                "targets": targets,
                "mask": torch.ones_like(targets, dtype=torch.bool),
                "documents": offsets.to(self.device).repeat(microbatches, 1),
            },
            microbatches,
            torch.tensor(float(targets.numel()), device=self.device),
            tokens.numel(),
        )

    def loss(self, hidden: Tensor, weight: Tensor, **fields: Any) -> TokenLoss:
        targets = fields.pop("targets")
        return linear_token_loss(hidden, weight, targets, self.spec, **fields)
