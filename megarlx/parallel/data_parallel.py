"""Data parallelism on flat buffers, the ground that the sharded optimizer stands on.

All parameters of a rank are views into one buffer, their gradients into another (fp32, or fp64 in
fp64 runs). The buffers are cut into buckets in the order in which backward finishes; a bucket is
reduced over the data-parallel ranks as soon as its last gradient is there, each rank keeping its
part of every bucket. These parts in a row are the rank's *shard*: the optimizer's master weights
and moments exist for the shard only (ZeRO-1), and the new weights are gathered from the shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from megarlx.comm.collectives import (
    Pending,
    all_gather_flat_,
    all_reduce_,
    reduce_scatter_flat_,
)
from megarlx.comm.groups import Group
from megarlx.parallel.metadata import ParameterInfo, Piece, Rectangle, flat_pieces

ALIGNMENT = 64  # elements: every rank's part of a bucket starts on a cache line, in any dtype


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies in the flat buffer."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        return self.start + prod(self.shape)


@dataclass(frozen=True)
class FlatLayout:
    """The flat buffer as pure data: slots, buckets, and which elements a rank's shard holds."""

    slots: tuple[Slot, ...]
    buckets: tuple[tuple[int, int], ...]
    decayed_buckets: int  # the first buckets hold the parameters with weight decay, and only these
    ranks: int

    @staticmethod
    def make(
        parameters: Sequence[tuple[str, tuple[int, ...], bool]],
        ranks: int,
        bucket_elements: int = 25_000_000,
    ) -> FlatLayout:
        """`parameters`: (name, shape, weight decay) in the order in which gradients come ready."""
        grain = ALIGNMENT * ranks
        slots: list[Slot] = []
        buckets: list[tuple[int, int]] = []
        decayed_buckets = 0
        position = bucket_start = 0
        for decayed in (True, False):
            for name, shape, decays in parameters:
                if decays is not decayed:
                    continue
                slots.append(Slot(name, tuple(shape), position))
                position += -(-prod(shape) // ALIGNMENT) * ALIGNMENT
                if position - bucket_start >= bucket_elements:
                    position = bucket_start + -(-(position - bucket_start) // grain) * grain
                    buckets.append((bucket_start, position))
                    bucket_start = position
            if position > bucket_start:
                position = bucket_start + -(-(position - bucket_start) // grain) * grain
                buckets.append((bucket_start, position))
                bucket_start = position
            if decayed:
                decayed_buckets = len(buckets)
        return FlatLayout(tuple(slots), tuple(buckets), decayed_buckets, ranks)

    @property
    def size(self) -> int:
        return self.buckets[-1][1] if self.buckets else 0

    @property
    def shard_size(self) -> int:
        return self.size // self.ranks

    @property
    def decayed_shard_size(self) -> int:
        """The first elements of every shard: those with weight decay."""
        return (
            self.buckets[self.decayed_buckets - 1][1] // self.ranks if self.decayed_buckets else 0
        )

    def parts(self, rank: int) -> Iterator[tuple[int, int, int]]:
        """The rank's part of each bucket: (start, stop) in the buffer, then start in the shard."""
        for start, stop in self.buckets:
            length = (stop - start) // self.ranks
            yield start + rank * length, start + (rank + 1) * length, start // self.ranks

    def chunks(
        self, infos: Mapping[str, ParameterInfo], rank: int
    ) -> Iterator[tuple[Piece, int, Rectangle]]:
        """The shard in model space: (piece, start in the shard, block of the global tensor).

        Padding of buffers and vocabulary belongs to no piece and never appears. Blocks of pieces
        that this rank does not count (copies) do appear: who saves looks at `piece.counts`.
        """
        for start, stop, shard_start in self.parts(rank):
            for slot in self.slots:
                low, high = max(start, slot.start), min(stop, slot.stop)
                if low >= high:
                    continue
                row_width = prod(slot.shape[1:])
                for piece, offset, block in flat_pieces(
                    infos[slot.name], row_width, low - slot.start, high - slot.start
                ):
                    yield piece, shard_start + slot.start + offset - start, block


class DataParallel:
    """Owns the flat buffers of one rank and moves gradients and weights over `group`.

    One objective's step: `begin(microbatches, into)`, forward and backward, `finish()`. Reductions
    run during backward where gradients arrive through hooks; what is left is done by `finish`.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        infos: Mapping[str, ParameterInfo],
        group: Group,
        *,
        sum_groups: Mapping[str, Group] | None = None,
        bucket_elements: int = 25_000_000,
    ) -> None:
        missing = sorted(set(parameters) ^ set(infos))
        if missing:
            raise ValueError(f"parameters and their infos differ in: {', '.join(missing)}")
        first = next(iter(parameters.values()))
        different = [n for n, p in parameters.items() if p.dtype != first.dtype]
        if different:
            raise ValueError(
                f"all parameters must be {first.dtype}; not so: {', '.join(different)}"
            )
        self.group, self.infos, self.parameters = group, infos, dict(parameters)
        self.sum_groups = dict(sum_groups or {})
        # Backward comes to the last parameters first.
        order = [(n, tuple(p.shape), infos[n].weight_decay) for n, p in parameters.items()][::-1]
        self.layout = FlatLayout.make(order, group.size, bucket_elements)
        device, size = first.device, self.layout.size
        self.gradient_dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.weights = torch.zeros(size, dtype=first.dtype, device=device)
        self.gradients = torch.zeros(size, dtype=self.gradient_dtype, device=device)
        self._bucket_of: dict[str, int] = {}
        self._sums: dict[str, list[Tensor]] = {}
        for slot in self.layout.slots:
            self._place(slot, self.parameters[slot.name])
        self._into: Tensor | None = None
        self._pending: dict[int, Pending | None] = {}
        self._waiting: list[int] = []

    def _place(self, slot: Slot, parameter: nn.Parameter) -> None:
        view = self.weights[slot.start : slot.stop].view(slot.shape)
        view.copy_(parameter.detach())
        parameter.data = view
        parameter.requires_grad_(True)
        if parameter.dtype != self.gradient_dtype:
            parameter.grad_dtype = self.gradient_dtype
        gradient = self.gradients[slot.start : slot.stop].view(slot.shape)
        parameter.grad = gradient
        bucket = next(i for i, (a, b) in enumerate(self.layout.buckets) if a <= slot.start < b)
        self._bucket_of[slot.name] = bucket
        for piece in self.infos[slot.name].pieces:
            rows = gradient[piece.first_row : piece.first_row + piece.block.size[0]]
            for name in piece.sum_over:
                if name not in self.sum_groups:
                    raise ValueError(
                        f"{slot.name}: its gradient is to be summed over '{name}', but the groups "
                        f"given are: {', '.join(self.sum_groups) or 'none'}"
                    )
                if self.sum_groups[name].size > 1:
                    self._sums.setdefault(name, []).append(rows)
        parameter.register_post_accumulate_grad_hook(lambda _: self._arrived(bucket))

    @property
    def needs_sums(self) -> bool:
        return bool(self._sums)

    def begin(self, microbatches: int, into: Tensor) -> None:
        """Clears the gradients; their sum over `microbatches` will be reduced into a shard."""
        if into.shape != (self.layout.shard_size,) or into.dtype != self.gradient_dtype:
            raise ValueError(
                f"the shard is {tuple(into.shape)} {into.dtype}; allowed: "
                f"({self.layout.shard_size},) {self.gradient_dtype}"
            )
        self.gradients.zero_()
        self._into, self._pending = into, {}
        counts = [0] * len(self.layout.buckets)
        for bucket in self._bucket_of.values():
            counts[bucket] += microbatches
        self._waiting = counts

    def _arrived(self, bucket: int) -> None:
        if self._into is None:
            return
        self._waiting[bucket] -= 1
        # Partial sums over other axes come first, and those are known only after backward.
        if self._waiting[bucket] == 0 and not self._sums:
            self._reduce(bucket)

    def _reduce(self, bucket: int) -> None:
        assert self._into is not None
        start, stop = self.layout.buckets[bucket]
        part = self._into[start // self.group.size : stop // self.group.size]
        source = self.gradients[start:stop]
        if self.group.size == 1:
            if part.data_ptr() != source.data_ptr():
                part.copy_(source)
            self._pending[bucket] = None
        else:
            self._pending[bucket] = reduce_scatter_flat_(part, source, self.group, async_op=True)

    def finish(self) -> None:
        """Reduces what hooks have not, and waits: the shard then holds the summed gradients."""
        for name, rows in self._sums.items():
            together = torch.cat([r.reshape(-1) for r in rows])
            all_reduce_(together, self.sum_groups[name])
            for target, part in zip(rows, together.split([r.numel() for r in rows]), strict=True):
                target.copy_(part.view(target.shape))
        for bucket in range(len(self.layout.buckets)):
            if bucket not in self._pending:
                self._reduce(bucket)
        for pending in self._pending.values():
            if pending is not None:
                pending.wait()
        self._into = None

    def shard_of_weights(self) -> Tensor:
        """This rank's shard of the weights; a view where the whole buffer is the shard."""
        if self.group.size == 1:
            return self.weights
        return torch.cat([self.weights[a:b] for a, b, _ in self.layout.parts(self.group.rank)])

    def gather_weights(self, shard: Tensor) -> None:
        """Every rank's shard of new weights becomes everybody's weights."""
        if self.group.size == 1:
            if shard.data_ptr() != self.weights.data_ptr():
                self.weights.copy_(shard)
            return
        pending = []
        for start, stop in self.layout.buckets:
            part = shard[start // self.group.size : stop // self.group.size]
            pending.append(
                all_gather_flat_(self.weights[start:stop], part, self.group, async_op=True)
            )
        for one in pending:
            one.wait()

    def uncounted_ranges(self) -> list[tuple[int, int]]:
        """Ranges of the shard whose elements another rank counts in norms, merged."""
        ranges: list[tuple[int, int]] = []
        for piece, start, block in self.layout.chunks(self.infos, self.group.rank):
            if piece.counts:
                continue
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], start + prod(block.size))
            else:
                ranges.append((start, start + prod(block.size)))
        return ranges
