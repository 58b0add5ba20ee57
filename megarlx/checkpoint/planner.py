"""torch DCP's planning, with JSON between the ranks.

DCP's own driver sends plans as pickles and stores its metadata as one. Here its planners are called
directly: a rank's plan travels as JSON, and every rank makes the same global plan of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, WriteItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megarlx.checkpoint.errors import CheckpointError
from megarlx.checkpoint.manifest import DTYPES, tiling_problem
from megarlx.checkpoint.shards import ModelTensor, write_item
from megarlx.comm.collectives import gather_values
from megarlx.comm.groups import Group

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SavePlanner(DefaultSavePlanner):
    """Plans the blocks of ModelTensors; nothing else is ever in its state."""

    def __init__(self, tensors: Mapping[str, ModelTensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.tensors = tensors

    def create_local_plan(self) -> SavePlan:
        items = [item for name, held in self.tensors.items() for item in held.write_items(name)]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.tensors[write_item.index.fqn].block_at(
            MetadataIndex(write_item.index.fqn, write_item.index.offset)
        )


class LoadPlanner(DefaultLoadPlanner):
    """Plans the reads that fill the blocks of ModelTensors, copies included."""

    def __init__(self, tensors: Mapping[str, ModelTensor], metadata: Metadata) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.tensors, self.metadata = tensors, metadata

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for name, held in self.tensors.items():
            saved = self.metadata.state_dict_metadata[name]
            assert isinstance(saved, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, saved, held.chunk_list())
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.tensors[index.fqn].block_at(index)


def plan_save(
    tensors: Mapping[str, ModelTensor], world: Group
) -> tuple[SavePlanner, list[SavePlan], Metadata]:
    """This rank's planner, every rank's plan and what all of them hold together."""
    planner = SavePlanner(tensors)
    gathered = gather_values(_as_json(planner.create_local_plan()), world)
    try:
        # Where several ranks hold a block, as replicas do the weights, one of them is chosen.
        plans, metadata = planner.create_global_plan([_from_json(one) for one in gathered])
    except ValueError as error:
        raise CheckpointError(f"the ranks' parts do not make up the tensors: {error}") from error
    for name, saved in metadata.state_dict_metadata.items():
        assert isinstance(saved, TensorStorageMetadata)
        boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in saved.chunks]
        problem = tiling_problem(tuple(saved.size), boxes)
        if problem:
            raise CheckpointError(
                f"the ranks' parts of {name} do not make up the tensor: {problem}"
            )
    planner.finish_plan(plans[world.rank])
    return planner, plans, metadata


def _as_json(plan: SavePlan) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for item in plan.items:
        data = item.tensor_data
        assert data is not None
        name = item.index.fqn
        entry = content.setdefault(
            name,
            {"dtype": DTYPE_NAMES[data.properties.dtype], "shape": list(data.size), "blocks": []},
        )
        entry["blocks"].append([list(data.chunk.offsets), list(data.chunk.sizes)])
    return content


def _from_json(content: dict[str, Any]) -> SavePlan:
    return SavePlan(
        [
            write_item(
                name,
                DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
                ChunkStorageMetadata(torch.Size(offset), torch.Size(size)),
            )
            for name, entry in content.items()
            for offset, size in entry["blocks"]
        ]
    )
