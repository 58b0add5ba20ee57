"""From a dataset to the micro-batches of a rank.

The cursor (sequences consumed by all ranks so far) is the whole state: the batch of a step is a
pure function of the cursor, the sizes and the rank. The prefetch thread only does earlier what
would be done anyway.

Letters: B sequences_per_microbatch, S sequence_length, N documents in a micro-batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megarlx.config.batch import uneven
from megarlx.data.samples import Dataset, Sample


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank."""

    inputs: Tensor  # int64 [B, S]
    targets: Tensor  # int64 [B, S]
    mask: Tensor | None  # bool [B, S], which targets count; None: all
    # int32 [N + 1]: where documents begin in the B·S tokens laid one row after the other, for
    # attention that stays inside a document; None: every row is one document.
    cu_seqlens: Tensor | None
    indices: tuple[int, ...]  # the global samples in it
    sources: tuple[int, ...]


@dataclass(frozen=True)
class BatchLayout:
    """How a global batch is dealt out: each rank gets consecutive sequences of it."""

    sequences_per_step: int
    sequences_per_microbatch: int
    rank: int = 0  # in the data-parallel group
    size: int = 1
    said_in: str = "training"  # the table that says sequences_per_step

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"loader: rank is {self.rank}; allowed 0 to {self.size - 1}")
        at_once = self.sequences_per_microbatch * self.size
        if self.sequences_per_microbatch < 1 or self.sequences_per_step < 1:
            raise ValueError(
                f"loader: sequences_per_step is {self.sequences_per_step}, "
                f"sequences_per_microbatch {self.sequences_per_microbatch}; allowed are at least 1"
            )
        if said := uneven(self.sequences_per_step, at_once, "dp"):
            raise ValueError(f"{self.said_in}.sequences_per_step {said}")

    @property
    def microbatches(self) -> int:
        return self.sequences_per_step // (self.sequences_per_microbatch * self.size)

    def indices(self, cursor: int, microbatch: int) -> range:
        """Global samples of one micro-batch of this rank."""
        if not 0 <= microbatch < self.microbatches:
            raise IndexError(f"loader: micro-batch {microbatch} of {self.microbatches}")
        per_rank = self.sequences_per_step // self.size
        first = cursor + self.rank * per_rank + microbatch * self.sequences_per_microbatch
        return range(first, first + self.sequences_per_microbatch)


class Loader:
    """Gives a step's micro-batches and moves the cursor by one global batch."""

    def __init__(
        self,
        dataset: Dataset,
        layout: BatchLayout,
        *,
        consumed_sequences: int = 0,
        with_documents: bool = False,
        documents_at_most: int | None = None,
        prefetch_steps: int = 2,
    ) -> None:
        """`documents_at_most` pads cu_seqlens with empty documents to one length for all
        micro-batches, which a pipeline needs."""
        self.dataset, self.layout = dataset, layout
        self.with_documents, self.documents_at_most = with_documents, documents_at_most
        self.consumed_sequences = consumed_sequences
        self._prefetch_steps = prefetch_steps
        self._thread = ThreadPoolExecutor(1, "megarlx-loader") if prefetch_steps else None
        self._coming: deque[tuple[int, Future[list[Batch]]]] = deque()

    def deal_to(self, rank: int, size: int) -> None:
        """Goes on as one of another number of ranks; the cursor stays."""
        layout = replace(self.layout, rank=rank, size=size)
        if layout != self.layout:
            self.layout = layout
            self._forget()

    def step_at(self, cursor: int) -> list[Batch]:
        """All micro-batches of this rank for the step that starts at `cursor`."""
        return [
            self._batch(self.layout.indices(cursor, m)) for m in range(self.layout.microbatches)
        ]

    def next_step(self) -> list[Batch]:
        cursor = self.consumed_sequences
        batches = self._ahead(cursor) if self._thread else self.step_at(cursor)
        self.consumed_sequences = cursor + self.layout.sequences_per_step
        return batches

    def _ahead(self, cursor: int) -> list[Batch]:
        assert self._thread is not None
        if self._coming and self._coming[0][0] != cursor:  # the cursor was moved from outside
            self._forget()
        while len(self._coming) <= self._prefetch_steps:
            at = cursor + len(self._coming) * self.layout.sequences_per_step
            self._coming.append((at, self._thread.submit(self.step_at, at)))
        try:
            return self._coming[0][1].result()
        finally:
            self._coming.popleft()

    def _forget(self) -> None:
        for _, future in self._coming:
            future.cancel()
        self._coming.clear()

    def _batch(self, indices: range) -> Batch:
        samples = [self.dataset.sample(index) for index in indices]
        shape = (len(samples), self.dataset.sequence_length)
        inputs, targets = np.empty(shape, np.int64), np.empty(shape, np.int64)
        for row, sample in enumerate(samples):
            inputs[row], targets[row] = sample.inputs, sample.targets
        masks = [sample.mask for sample in samples if sample.mask is not None]
        if masks and len(masks) != len(samples):
            raise ValueError("loader: some samples of a micro-batch have a mask and some have none")
        return Batch(
            inputs=torch.from_numpy(inputs),
            targets=torch.from_numpy(targets),
            mask=torch.from_numpy(np.stack(masks)) if masks else None,
            cu_seqlens=self._cu_seqlens(samples) if self.with_documents else None,
            indices=tuple(indices),
            sources=tuple(sample.source for sample in samples),
        )

    def _cu_seqlens(self, samples: list[Sample]) -> Tensor:
        lengths = [length for sample in samples for length in sample.document_lengths]
        if self.documents_at_most is not None:
            if len(lengths) > self.documents_at_most:
                raise ValueError(
                    f"loader: a micro-batch holds {len(lengths)} documents; documents_at_most "
                    f"allows {self.documents_at_most}"
                )
            lengths += [0] * (self.documents_at_most - len(lengths))
        return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))

    def state(self) -> dict[str, Any]:
        return {
            "consumed_sequences": self.consumed_sequences,
            "dataset": self.dataset.fingerprint(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken; refuses data that is not the same up to there."""
        saved, now = state["dataset"], self.dataset.fingerprint()
        as_read = getattr(self.dataset, "as_read", None)  # not every dataset has parts
        if as_read is not None:
            consumed = int(state["consumed_sequences"])
            saved, now = as_read(saved, now, consumed), as_read(now, saved, consumed)
        differences = _differences(saved, now, "")
        if differences:
            files = getattr(self.dataset, "files", {})  # not every dataset lies in files
            lines = [*differences, *(f"{name} lies in {place}" for name, place in files.items())]
            raise ValueError(
                "the data is not what the run was saved with:\n  " + "\n  ".join(lines)
            )
        self.consumed_sequences = int(state["consumed_sequences"])
        self._forget()

    def close(self) -> None:
        self._forget()
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None


def _differences(saved: Any, now: Any, where: str) -> list[str]:
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        return [
            line
            for key in sorted({*saved, *now})
            for line in _differences(saved.get(key), now.get(key), f"{where}.{key}".lstrip("."))
        ]
    return [] if saved == now else [f"{where} was {saved}, is {now}"]
