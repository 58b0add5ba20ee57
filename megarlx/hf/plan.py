"""Which file gets which blocks: pure data, the same on every rank and at every restart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch

from megarlx.checkpoint.files import Entry
from megarlx.checkpoint.manifest import Chunk, SavedFile, SavedTensor, entry_name
from megarlx.checkpoint.planner import DTYPE_NAMES
from megarlx.checkpoint.storage import KINDS, file_name, kind_of
from megarlx.comm.groups import Group, Layout
from megarlx.config.model import ModelConfig
from megarlx.model.check_layout import check_layout
from megarlx.model.transformer import Stage
from megarlx.parallel.data_parallel import FlatLayout
from megarlx.parallel.metadata import ParameterLayout, Rectangle
from megarlx.parallel.pipeline_plan import PipelinePlan


@dataclass(frozen=True)
class PlannedBlock:
    """A block of one of the source's tensors, and the entry it becomes."""

    tensor: str
    start: tuple[int, ...]
    entry: Entry  # its shape is the block's


@dataclass(frozen=True)
class PlannedFile:
    name: str
    blocks: tuple[PlannedBlock, ...]

    @property
    def bytes(self) -> int:
        return sum(block.entry.bytes for block in self.blocks)


Shapes = Mapping[str, tuple[int, ...]]
Types = Mapping[str, torch.dtype]


def _block(
    name: str, shapes: Shapes, dtypes: Types, start: tuple[int, ...], size: tuple[int, ...]
) -> PlannedBlock:
    return PlannedBlock(
        name, start, Entry(entry_name(name, shapes[name], start, size), dtypes[name], size)
    )


def files_by_size(shapes: Shapes, dtypes: Types, file_bytes: int) -> list[PlannedFile]:
    """A checkpoint's files, of about `file_bytes`; a larger tensor is cut along its rows."""
    groups: list[list[PlannedBlock]] = []
    for kind in KINDS:
        names = [name for name in shapes if kind_of(name) == kind]
        blocks = [b for name in names for b in _cut(name, shapes, dtypes, file_bytes)]
        groups += _grouped(blocks, file_bytes, lambda block: block.entry.bytes)
    return [
        PlannedFile(file_name(blocks[0].tensor, number), tuple(blocks))
        for number, blocks in enumerate(groups)
    ]


def _cut(name: str, shapes: Shapes, dtypes: Types, most: int) -> Iterator[PlannedBlock]:
    shape = shapes[name]
    if not shape:
        yield _block(name, shapes, dtypes, (), ())
        return
    rows = max(1, most // max(1, prod(shape[1:]) * dtypes[name].itemsize))
    rest = (0,) * (len(shape) - 1)
    for first in range(0, shape[0], rows):
        size = (min(rows, shape[0] - first), *shape[1:])
        yield _block(name, shapes, dtypes, (first, *rest), size)


def _grouped(
    blocks: list[PlannedBlock], most: int, size: Callable[[PlannedBlock], int]
) -> list[list[PlannedBlock]]:
    groups: list[list[PlannedBlock]] = []
    filled = most
    for block in blocks:
        if filled + size(block) > most:
            groups.append([])
            filled = 0
        groups[-1].append(block)
        filled += size(block)
    return groups


def files_by_layout(
    config: ModelConfig, layout: Layout, shapes: Shapes, dtypes: Types
) -> list[PlannedFile]:
    """The files that a run in this layout writes itself: each rank then reads its own and no more.

    `shapes` are weights and, where there are any, moments and reference policies by their names
    in a checkpoint.
    """
    check_layout(config, layout)
    prefixes = list(dict.fromkeys(n.removesuffix("norm.weight") for n in shapes if _is_final(n)))
    plan = PipelinePlan.make(config.layers, layout.pp)
    files = []
    for rank in range(layout.world_size):
        place = layout.coordinates(rank)
        flat, layouts = _shard(config, plan, layout, place["pp"], place["tp"])
        chunks: dict[str, list[Rectangle]] = {}
        for piece, _, block in flat.chunks(layouts, place["dp"]):
            if piece.counts_in_norm:
                chunks.setdefault(piece.name, []).append(block)
        for kind in KINDS:
            # As a rank's shards are walked: one after the other, its tensors in their order.
            blocks = [
                _block(prefix + name, shapes, dtypes, block.start, block.size)
                for prefix in prefixes
                if kind_of(prefix) == kind
                for name, held in chunks.items()
                for block in held
            ]
            if blocks:
                files.append(PlannedFile(file_name(blocks[0].tensor, rank), tuple(blocks)))
    return files


def _is_final(name: str) -> bool:
    """The one tensor that every model has and whose name ends no other."""
    return name == "norm.weight" or name.endswith("/norm.weight")


def _shard(
    config: ModelConfig, plan: PipelinePlan, layout: Layout, pp: int, tp: int
) -> tuple[FlatLayout, dict[str, ParameterLayout]]:
    """What the ranks at one place of the pipeline and tensor axes hold, without any process."""
    alone = Group.alone()
    group = Group("tp", tuple(range(layout.tp)), tp, None, alone.traffic, alone.timeout_seconds)
    first, last = plan.layers[pp]
    stage = Stage(
        config,
        group=group,
        first=first,
        last=last,
        embedding=pp == 0,
        head=pp == plan.size - 1,
        device="meta",
    )
    layouts = stage.layouts
    # The order of DataParallel: backward comes to the last parameters first.
    order = [(n, tuple(p.shape), layouts[n].weight_decay) for n, p in stage.named_parameters()]
    return FlatLayout.make(order[::-1], layout.dp), layouts


def hugging_face_files(
    names: Mapping[str, str], shapes: Shapes, dtypes: Types, file_bytes: int
) -> list[PlannedFile]:
    """Whole tensors under their names there, in files of about `file_bytes`."""
    blocks = [
        PlannedBlock(ours, (0,) * len(shapes[ours]), Entry(theirs, dtypes[ours], shapes[ours]))
        for ours, theirs in names.items()
    ]
    groups = _grouped(blocks, file_bytes, lambda block: block.entry.bytes)
    if len(groups) == 1:
        return [PlannedFile("model.safetensors", tuple(groups[0]))]
    return [
        PlannedFile(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(blocks))
        for number, blocks in enumerate(groups, 1)
    ]


def saved_tensors(
    files: list[PlannedFile], shapes: Shapes, saved: list[SavedFile]
) -> dict[str, SavedTensor]:
    """What the manifest says about the tensors once the files are there."""
    place = {file.name: number for number, file in enumerate(saved)}
    chunks: dict[str, list[Chunk]] = {}
    dtypes: dict[str, str] = {}
    for file in files:
        for block in file.blocks:
            chunk = Chunk(place[file.name], block.start, block.entry.shape)
            chunks.setdefault(block.tensor, []).append(chunk)
            dtypes[block.tensor] = DTYPE_NAMES[block.entry.dtype]
    return {
        name: SavedTensor(dtypes[name], shapes[name], tuple(held))
        for name, held in sorted(chunks.items())
    }
