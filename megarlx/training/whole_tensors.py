"""Tensors of the model put together from the shards that hold them, changed, and dealt out again.

A matrix of the model lies in pieces: rows or columns on tensor-parallel ranks, several projections
fused into one parameter, flat parts of that on data-parallel ranks, and some key/value heads more
than once. Which rank holds what is arithmetic, the same on all of them; each tensor has one rank
that computes it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from megarlx.comm.exchange import all_to_all
from megarlx.comm.groups import Group
from megarlx.model.build import ParallelModel
from megarlx.parallel.data_parallel import FlatLayout, Slot
from megarlx.parallel.metadata import ParameterLayout, Piece, Rectangle, flat_pieces

Wanted = Callable[[str, tuple[int, ...]], bool]  # name and shape of a tensor of the model


class Block(NamedTuple):
    """A part of a tensor where it lies."""

    rank: int  # in the group of data and tensor parallelism
    start: int  # in that rank's shard
    place: Rectangle  # of the tensor
    sent: bool  # by one of those that hold a copy

    @property
    def stop(self) -> int:
        return self.start + prod(self.place.size)

    def of_shard(self, shard: Tensor) -> Tensor:
        return shard[self.start : self.stop].view(self.place.size)

    def of_tensor(self, tensor: Tensor) -> Tensor:
        """A view, in two dimensions or one."""
        for dim, (start, size) in enumerate(zip(self.place.start, self.place.size, strict=True)):
            tensor = tensor.narrow(dim, start, size)
        return tensor


class Whole(NamedTuple):
    """A tensor of the model, or its tied copy on another stage."""

    shape: tuple[int, ...]
    owner: int  # the rank that computes it
    blocks: tuple[Block, ...]


def whole_tensors(
    layout: FlatLayout, layouts: Sequence[Mapping[str, ParameterLayout]], wanted: Wanted
) -> list[Whole]:
    """All that are `wanted`; `layouts` of each tensor-parallel rank. The same list on every rank.

    Each goes to the rank that has least to compute so far, the largest first.
    """
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    blocks: dict[tuple[str, str], list[Block]] = defaultdict(list)
    for slot in layout.slots:
        for tp_rank, of_rank in enumerate(layouts):
            for dp_rank, piece, start, place in _blocks_of(slot, of_rank[slot.name], layout):
                if not wanted(piece.name, piece.global_shape):
                    continue
                key = slot.name, piece.name  # a tied tensor can lie in two parameters of a rank
                shapes[key] = piece.global_shape
                sent = piece.replicated_over[0] == tp_rank
                rank = dp_rank * len(layouts) + tp_rank
                blocks[key].append(Block(rank, start, place, sent))
    load = [0] * (layout.ranks * len(layouts))
    owners = {}
    for key in sorted(shapes, key=lambda key: prod(shapes[key]), reverse=True):
        owners[key] = load.index(min(load))
        load[owners[key]] += prod(shapes[key])
    return [Whole(shapes[key], owners[key], tuple(blocks[key])) for key in shapes]


def _blocks_of(
    slot: Slot, parameter: ParameterLayout, layout: FlatLayout
) -> Iterator[tuple[int, Piece, int, Rectangle]]:
    """(data-parallel rank, piece, start in its shard, block) of all that a parameter holds."""
    begin, end = next((a, b) for a, b in layout.buckets if a <= slot.start < b)
    part = (end - begin) // layout.ranks
    for rank in range((slot.start - begin) // part, (slot.stop - 1 - begin) // part + 1):
        part_start = begin + rank * part
        low, high = max(part_start, slot.start), min(part_start + part, slot.stop)
        for piece, offset, block in flat_pieces(parameter, low - slot.start, high - slot.start):
            in_part = slot.start + offset - part_start
            yield rank, piece, begin // layout.ranks + in_part, block


def elements_sent(wholes: Sequence[Whole], rank: int) -> int:
    """By a rank, to others: its blocks to those that compute them, and what it computed."""
    total = 0
    for whole in wholes:
        for block in whole.blocks:
            given = block.rank == rank and block.sent and whole.owner != rank
            dealt_out = whole.owner == rank and block.rank != rank
            total += (block.stop - block.start) * (given + dealt_out)
    return total


class WholeTensors:
    """The exchange of some tensors between the shards of `group`, seen from one rank."""

    def __init__(self, wholes: Sequence[Whole], group: Group) -> None:
        self.group = group
        self.mine = [whole for whole in wholes if whole.owner == group.rank]
        # By the other rank: blocks of this shard that are of its tensors, and the other way round.
        self._here: list[list[Block]] = [[] for _ in group.ranks]
        self._there: list[list[tuple[int, Block]]] = [[] for _ in group.ranks]
        for whole in wholes:
            self._here[whole.owner] += [b for b in whole.blocks if b.rank == group.rank]
        for index, whole in enumerate(self.mine):
            for block in whole.blocks:
                self._there[block.rank].append((index, block))

    @staticmethod
    def of(model: ParallelModel, wanted: Wanted) -> WholeTensors:
        layouts = [model.layouts_at(rank) for rank in range(model.mesh.tp.size)]
        wholes = whole_tensors(model.data_parallel.layout, layouts, wanted)
        return WholeTensors(wholes, model.mesh.shards)

    def ranges(self) -> list[tuple[int, int]]:
        """Where in this rank's shard they lie, in order."""
        return sorted((b.start, b.stop) for blocks in self._here for b in blocks)

    def changed(self, values: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """A shard in which each element is of `function` of its whole tensor; elsewhere 0."""
        results = []
        for matrix in self._gather(values):
            result = function(matrix)
            if result.shape != matrix.shape or result.dtype != matrix.dtype:
                raise ValueError(
                    f"what is made of a whole tensor is {list(result.shape)} {result.dtype}; "
                    f"it must be {list(matrix.shape)} {matrix.dtype}"
                )
            results.append(result)
        return self._deal_out(results, values)

    def _gather(self, values: Tensor) -> list[Tensor]:
        given = [[b for b in blocks if b.sent] for blocks in self._here]
        taken = [[(i, b) for i, b in blocks if b.sent] for blocks in self._there]
        sizes = [sum(b.stop - b.start for _, b in blocks) for blocks in taken]
        sent = [_joined([values[b.start : b.stop] for b in bs], values) for bs in given]
        matrices = [values.new_empty(whole.shape) for whole in self.mine]
        for blocks, part in zip(taken, all_to_all(sent, sizes, self.group), strict=True):
            at = 0
            for index, block in blocks:
                size = block.stop - block.start
                place = block.of_tensor(matrices[index])
                place.copy_(part[at : at + size].view(block.place.size))
                at += size
        return matrices

    def _deal_out(self, results: Sequence[Tensor], like: Tensor) -> Tensor:
        sizes = [sum(b.stop - b.start for b in blocks) for blocks in self._here]
        sent = [
            _joined([block.of_tensor(results[i]).reshape(-1) for i, block in blocks], like)
            for blocks in self._there
        ]
        shard = torch.zeros_like(like)
        for blocks, part in zip(self._here, all_to_all(sent, sizes, self.group), strict=True):
            at = 0
            for block in blocks:
                size = block.stop - block.start
                shard[block.start : block.stop] = part[at : at + size]
                at += size
        return shard


def _joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat(list(parts)) if parts else like.new_empty(0)
