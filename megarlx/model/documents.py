"""Documents packed one after another into a row of tokens, and how the CPU walks through them.

Letters: T tokens of all documents, N documents, L a bucket's padded length, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


def padded_length(length: int) -> int:
    """Documents of nearly equal length share a bucket: at most an eighth (or 16) is padding."""
    step = max(16, 1 << max(length.bit_length() - 4, 0))
    return -(-length // step) * step


@dataclass(frozen=True)
class Buckets:
    """Documents padded at their end, grouped by padded length.

    Padding behind a document needs no mask: under causal attention only padding sees padding.
    """

    sizes: tuple[tuple[int, int], ...]  # (documents, padded length) of each bucket, in order
    source: Tensor  # [sum of documents·L] token of each padded place; padding repeats the last one
    place: Tensor  # [T] padded place of each token


@dataclass(frozen=True)
class Documents:
    """Where each document begins: `offsets` is int32 [N+1]; empty documents at the end are fine."""

    offsets: Tensor
    longest: int  # an upper bound that needs no read from the device
    tokens: int

    def __post_init__(self) -> None:
        if self.offsets.dim() != 1 or len(self.offsets) < 2:
            raise ValueError(
                f"documents: offsets has shape {tuple(self.offsets.shape)}; it must be [N + 1]"
            )

    @staticmethod
    def rows(batch: int, length: int, device: torch.device | str = "cpu") -> Documents:
        """Every row of a [batch, length] batch is one document."""
        offsets = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)
        documents = Documents(offsets, length, batch * length)
        documents.__dict__["lengths"] = (length,) * batch
        return documents

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Documents:
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        torch.cumsum(torch.tensor(lengths, dtype=torch.int32), 0, out=offsets[1:])
        sent = offsets.to(device, non_blocking=True)
        documents = Documents(sent, max(lengths), sum(lengths))
        documents.__dict__["lengths"] = tuple(lengths)
        return documents

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """On a CUDA device this waits for it, unless all are as long as the longest; only the path
        without flash-attn needs it there."""
        count = len(self.offsets) - 1
        if not self.offsets.is_cpu and count * self.longest == self.tokens:
            return (self.longest,) * count  # none is longer, so none is shorter
        lengths = tuple(self.offsets.diff().tolist())
        if sum(lengths) != self.tokens or min(lengths) < 0 or max(lengths) > self.longest:
            raise ValueError(
                f"documents: lengths {lengths} do not lie in [0, {self.longest}] "
                f"or do not add up to {self.tokens} tokens"
            )
        return lengths

    @cached_property
    def document_of_token(self) -> Tensor:
        index = torch.arange(len(self.offsets) - 1, device=self.offsets.device)
        return index.repeat_interleave(self.offsets.diff(), output_size=self.tokens)

    @cached_property
    def positions(self) -> Tensor:
        """[T], counting from 0 in every document."""
        place = torch.arange(self.tokens, device=self.offsets.device)
        return place - self.offsets[:-1].index_select(0, self.document_of_token)

    @cached_property
    def equal(self) -> tuple[int, int] | None:
        """(documents, length) where all have the same length: then nothing need be moved."""
        lengths = [n for n in self.lengths if n]
        return (len(lengths), lengths[0]) if len(set(lengths)) == 1 else None

    @cached_property
    def buckets(self) -> Buckets:
        groups: dict[int, list[int]] = {}
        for index, length in enumerate(self.lengths):
            if length:
                groups.setdefault(padded_length(length), []).append(index)
        device = self.offsets.device
        source, sizes = [], []
        for padded, members in sorted(groups.items()):
            chosen = torch.tensor(members, device=device)
            begin, end = self.offsets[chosen].long(), self.offsets[chosen + 1].long()
            steps = begin[:, None] + torch.arange(padded, device=device)
            source.append(torch.minimum(steps, end[:, None] - 1).flatten())
            sizes.append((len(members), padded))
        places = torch.cat(source)
        # repetitions of a document's last token stand right behind it
        place = torch.empty(self.tokens, dtype=torch.int64, device=device)
        first = torch.ones_like(places, dtype=torch.bool)
        first[1:] = places[1:] != places[:-1]
        place[places[first]] = first.nonzero().flatten()
        return Buckets(tuple(sizes), places, place)


class _ToBuckets(torch.autograd.Function):
    """Tokens to padded places. The padding's gradient is zero, so backward need only look back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, buckets: Buckets) -> Tensor:
        ctx.place = buckets.place
        return x.index_select(0, buckets.source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, ctx.place), None


class _FromBuckets(torch.autograd.Function):
    """Padded places back to tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, buckets: Buckets) -> Tensor:
        ctx.place, ctx.places = buckets.place, len(x)
        return x.index_select(0, buckets.place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        out = grads[0].new_zeros(ctx.places, *grads[0].shape[1:])
        return out.index_copy_(0, ctx.place, grads[0]), None


def to_buckets(x: Tensor, buckets: Buckets) -> tuple[Tensor, ...]:
    """[T, H, D] to one [documents, L, H, D] a bucket."""
    padded = _ToBuckets.apply(x, buckets)
    parts = padded.split([count * length for count, length in buckets.sizes])
    return tuple(
        part.view(count, length, *x.shape[1:])
        for part, (count, length) in zip(parts, buckets.sizes, strict=True)
    )


def from_buckets(parts: Sequence[Tensor], buckets: Buckets) -> Tensor:
    """One [documents, L, H, D] a bucket to [T, H, D]."""
    flat = (
        parts[0].flatten(0, 1) if len(parts) == 1 else torch.cat([p.flatten(0, 1) for p in parts])
    )
    return _FromBuckets.apply(flat, buckets)
