"""Data parallelism on flat buffers, the ground that the sharded optimizer stands on.

All parameters of a rank are views into one buffer, their gradients into another (fp32, or fp64 in
fp64 runs). The buffers are cut into buckets in the order in which backward finishes; a bucket is
reduced over the data-parallel ranks as soon as its last gradient is there, each rank keeping its
part of every bucket. These parts in a row are the rank's *shard*: the optimizer's master weights
and moments exist for the shard only (ZeRO-1), and the new weights are gathered from the shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from megarlx.comm.collectives import Pending, all_gather_flat_, reduce_scatter_flat_
from megarlx.comm.groups import Group
from megarlx.parallel.metadata import ParameterLayout, Piece, Rectangle, flat_pieces

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

    def ranges_of(self, names: Collection[str], rank: int) -> Iterator[tuple[int, int]]:
        """Where these parameters lie in the rank's shard, each with the padding behind it."""
        for start, stop, shard_start in self.parts(rank):
            for slot in self.slots:
                padded = -(-slot.stop // ALIGNMENT) * ALIGNMENT
                low, high = max(start, slot.start), min(stop, padded)
                if slot.name in names and low < high:
                    yield shard_start + low - start, shard_start + high - start

    def chunks(
        self, layouts: Mapping[str, ParameterLayout], rank: int
    ) -> Iterator[tuple[Piece, int, Rectangle]]:
        """The shard in model space: (piece, start in the shard, block of the global tensor).

        Padding of buffers and vocabulary belongs to no piece and never appears. Blocks of pieces
        that this rank does not count (copies) do appear: see `piece.counts_in_norm`.
        """
        for start, stop, shard_start in self.parts(rank):
            for slot in self.slots:
                low, high = max(start, slot.start), min(stop, slot.stop)
                if low >= high:
                    continue
                for piece, offset, block in flat_pieces(
                    layouts[slot.name], low - slot.start, high - slot.start
                ):
                    yield piece, shard_start + slot.start + offset - start, block


class DataParallel:
    """Owns the flat buffers of one rank and moves gradients and weights over `group`.

    One objective's step: `begin(into)`, forward and backward, `finish()`. Where it `reduces_early`,
    `ready` is called in between for each parameter whose gradient is complete: buckets are reduced
    as they fill.

    `complete_gradients`, where a gradient on this rank is only a part of a sum over other axes
    (norms under sequence parallelism, copied key heads, tied embeddings), makes them whole before
    anything is reduced; buckets then wait for the end of backward.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        layouts: Mapping[str, ParameterLayout],
        group: Group,
        *,
        complete_gradients: Callable[[Mapping[str, Tensor]], None] | None = None,
        bucket_elements: int = 25_000_000,
    ) -> None:
        different = sorted(set(parameters) ^ set(layouts))
        if different:
            raise ValueError(f"parameters and their layouts differ in: {', '.join(different)}")
        first = next(iter(parameters.values()))
        mixed = [n for n, p in parameters.items() if p.dtype != first.dtype]
        if mixed:
            raise ValueError(f"all parameters must be {first.dtype}; not: {', '.join(mixed)}")
        self.group, self.layouts, self.parameters = group, layouts, dict(parameters)
        self.complete_gradients = complete_gradients
        # Backward comes to the last parameters first.
        order = [(n, tuple(p.shape), layouts[n].weight_decay) for n, p in parameters.items()]
        self.layout = FlatLayout.make(order[::-1], group.size, bucket_elements)
        device, size = first.device, self.layout.size
        self.gradient_dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.weights = torch.zeros(size, dtype=first.dtype, device=device)
        self.gradients = torch.zeros(size, dtype=self.gradient_dtype, device=device)
        self._bucket_of: dict[nn.Parameter, int] = {}
        for slot in self.layout.slots:
            self._place(slot, self.parameters[slot.name])
        self._into: Tensor | None = None
        self._pending: dict[int, Pending] = {}
        self._waiting: Counter[int] = Counter()

    def _place(self, slot: Slot, parameter: nn.Parameter) -> None:
        view = self.weights[slot.start : slot.stop].view(slot.shape)
        view.copy_(parameter.detach())
        parameter.data = view
        if parameter.dtype != self.gradient_dtype:
            parameter.grad_dtype = self.gradient_dtype
        # Backward adds into this view for ever: the gradient buffer is never reallocated.
        parameter.grad = self.gradients[slot.start : slot.stop].view(slot.shape)
        self._bucket_of[parameter] = next(
            i for i, (a, b) in enumerate(self.layout.buckets) if a <= slot.start < b
        )

    def begin(self, into: Tensor) -> None:
        """Clears the gradients; what backward adds up will be reduced into a shard."""
        if into.shape != (self.layout.shard_size,) or into.dtype != self.gradient_dtype:
            raise ValueError(
                f"the shard is {tuple(into.shape)} {into.dtype}; allowed: "
                f"({self.layout.shard_size},) {self.gradient_dtype}"
            )
        self.gradients.zero_()
        self._into, self._pending = into, {}
        self._waiting = Counter(self._bucket_of.values())

    @property
    def reduces_early(self) -> bool:
        """Whether anything is gained by `ready`: on one rank there is nothing to wait for, and
        watching every gradient takes time of Python, which a small model feels.
        """
        return self.group.size > 1 and self.complete_gradients is None

    def ready(self, parameter: nn.Parameter) -> None:
        """No more will be added to this parameter's gradient in this step."""
        bucket = self._bucket_of[parameter]
        self._waiting[bucket] -= 1
        if self._waiting[bucket] == 0 and self.reduces_early:
            self._reduce(bucket)

    def _reduce(self, bucket: int) -> None:
        assert self._into is not None
        start, stop = self.layout.buckets[bucket]
        if self._into is self.gradients:
            return  # one rank, one objective: the buffer is the shard
        part = self._into[start // self.group.size : stop // self.group.size]
        self._pending[bucket] = reduce_scatter_flat_(
            part, self.gradients[start:stop], self.group, async_op=True
        )

    def finish(self) -> None:
        """Reduces what is left, and waits: the shard then holds the summed gradients."""
        if self.complete_gradients is not None:
            self.complete_gradients(
                {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
            )
        for bucket in range(len(self.layout.buckets)):
            if bucket not in self._pending:
                self._reduce(bucket)
        for pending in self._pending.values():
            pending.wait()
        self._into = None

    def shard_of_weights(self) -> Tensor:
        """This rank's shard of the weights; the buffer itself where that is the shard."""
        if self.group.size == 1:
            return self.weights
        return torch.cat([self.weights[a:b] for a, b, _ in self.layout.parts(self.group.rank)])

    def gather_weights(self, shard: Tensor) -> None:
        """Every rank's shard of new weights becomes everybody's weights."""
        if shard is self.weights:
            return
        pending = [
            all_gather_flat_(
                self.weights[start:stop],
                shard[start // self.group.size : stop // self.group.size],
                self.group,
                async_op=True,
            )
            for start, stop in self.layout.buckets
        ]
        for one in pending:
            one.wait()

    def ranges_of(self, tensor: str) -> list[tuple[int, int]]:
        """Ranges of the shard that hold a tensor of the model, or its tied copy."""
        held = self.layouts.items()
        names = {name for name, one in held if any(p.name == tensor for p in one.pieces)}
        return list(self.layout.ranges_of(names, self.group.rank))

    def uncounted_ranges(self) -> list[tuple[int, int]]:
        """Ranges of the shard whose elements another rank counts in norms, merged."""
        ranges: list[tuple[int, int]] = []
        for piece, start, block in self.layout.chunks(self.layouts, self.group.rank):
            if piece.counts_in_norm:
                continue
            stop = start + prod(block.size)
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], stop)
            else:
                ranges.append((start, stop))
        return ranges
