"""A rank's flat shards as tensors of model space, which is what a checkpoint holds.

The optimizer has a flat shard of the master weights and one of each moment. Each is a row of
pieces of global tensors, so a global tensor is, on this rank, a few blocks: views into the shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megarlx.parallel.data_parallel import FlatLayout
from megarlx.parallel.metadata import ParameterLayout, Piece, Rectangle


@dataclass(frozen=True)
class ModelTensor:
    """The blocks of one global tensor that this rank holds; torch's planner asks it for them."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: tuple[tuple[Rectangle, Tensor], ...]

    def chunk_list(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(block.start), torch.Size(block.size))
            for block, _ in self.blocks
        ]

    def write_items(self, name: str) -> list[WriteItem]:
        return [write_item(name, self.dtype, self.shape, chunk) for chunk in self.chunk_list()]

    def block_at(self, index: MetadataIndex) -> Tensor:
        """The block at an offset. Copies of it on this rank share the offset; `index.index` then
        says which is meant."""
        if index.index is not None and index.index < len(self.blocks):
            block, values = self.blocks[index.index]
            if block.start == index.offset:
                return values
        return next(values for block, values in self.blocks if block.start == index.offset)


def write_item(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], chunk: ChunkStorageMetadata
) -> WriteItem:
    return WriteItem(
        MetadataIndex(name, chunk.offsets),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk, TensorProperties(dtype), torch.Size(shape)),
    )


@dataclass(frozen=True)
class FlatShards:
    """What of a model's state this rank holds.

    `shards` says what goes before the tensors' names in each flat shard: "" for the weights,
    "optimizer/rl/exp_avg/" for a moment. Make it once: plans are kept for as long as it is used.
    """

    layout: FlatLayout
    layouts: Mapping[str, ParameterLayout]
    rank: int  # data-parallel
    shards: Mapping[str, Tensor]

    @cached_property
    def _chunks(self) -> list[tuple[Piece, int, Rectangle]]:
        return list(self.layout.chunks(self.layouts, self.rank))

    def tensors(
        self, *, counted_only: bool, shards: Mapping[str, Tensor] | None = None
    ) -> dict[str, ModelTensor]:
        """`counted_only` skips copies that another rank saves: replicated key heads, ties.

        `shards`, of the same sizes, may stand in for these: copies on the host, say.
        """
        blocks: dict[str, list[tuple[Rectangle, Tensor]]] = {}
        facts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for prefix, shard in (self.shards if shards is None else shards).items():
            for piece, start, block in self._chunks:
                if counted_only and not piece.counts_in_norm:
                    continue
                name = prefix + piece.name
                facts[name] = piece.global_shape, shard.dtype
                values = shard[start : start + prod(block.size)].view(block.size)
                blocks.setdefault(name, []).append((block, values))
        return {name: ModelTensor(*facts[name], tuple(held)) for name, held in blocks.items()}

    def clear_(self) -> None:
        """Padding is in no checkpoint: it must be zero before a load fills the rest."""
        for shard in self.shards.values():
            shard.zero_()

    @property
    def bytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards.values())
