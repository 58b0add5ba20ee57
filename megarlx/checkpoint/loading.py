"""Loading a checkpoint into any layout."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megarlx.checkpoint.errors import CheckpointError, together
from megarlx.checkpoint.folder import check_sizes
from megarlx.checkpoint.manifest import Manifest, read_manifest
from megarlx.checkpoint.planner import DTYPE_NAMES, LoadPlanner
from megarlx.checkpoint.shards import FlatShards, ModelTensor
from megarlx.checkpoint.storage import AVERAGE, BESIDE, SafetensorsReader
from megarlx.checkpoint.verify import check_digests
from megarlx.comm.collectives import gather_values
from megarlx.comm.groups import Group

WEIGHTS_ONLY = BESIDE  # what to ignore


@dataclass(frozen=True)
class Loaded:
    path: Path
    iteration: int
    digest: str  # of the manifest, and through it of everything
    state: dict[str, Any]


def load(
    checkpoint: Path,
    shards: FlatShards,
    world: Group,
    *,
    ignore: Sequence[str] = (),
    only: str = "",
) -> Loaded:
    """Fills the shards from a checkpoint of any layout; called by all ranks of `world`.

    Every tensor of the checkpoint must be wanted by some rank, and be there for each that wants
    it, but for those whose names begin with something in `ignore`, or not with `only`. Files are
    checked whole, shared out over the ranks, before the first number is written; then blocks are
    copied one at a time out of mapped files.
    """
    tensors = shards.tensors(counted_only=False)
    task = f"loading {checkpoint}"
    with together(world, task):
        manifest = read_manifest(checkpoint)
        check_sizes(checkpoint, manifest)
    _check_same(world, task, manifest)
    wanted = _wanted(tensors, world)
    with together(world, task):
        _check_tensors(manifest, wanted, ignore, only)
        used = {c.file for name in wanted for c in manifest.tensors[name].chunks}
        mine = sorted(used)[world.rank :: world.size]
        check_digests(checkpoint, [manifest.files[i] for i in mine])
    with together(world, task):
        reader = SafetensorsReader(checkpoint, manifest)
        metadata = reader.read_metadata()
        reader.set_up_storage_reader(metadata, world.is_first)
        planner = LoadPlanner(tensors, metadata)
        plan = reader.prepare_local_plan(planner.create_local_plan())
        with torch.no_grad():
            shards.clear_()
            reader.read_data(planner.finish_plan(plan), planner).wait()
    return Loaded(checkpoint, manifest.iteration, manifest.digest, manifest.state)


def _check_same(world: Group, task: str, manifest: Manifest) -> None:
    digests = gather_values(manifest.digest, world)
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise CheckpointError(
                f"{task}: rank {world.ranks[rank]} sees a manifest with the digest {digest}, rank "
                f"{world.ranks[0]} one with {digests[0]}; all must read the same folder"
            )


def _wanted(
    tensors: Mapping[str, ModelTensor], world: Group
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor that some rank holds a part of."""
    mine = {
        name: [DTYPE_NAMES[tensor.dtype], list(tensor.shape)] for name, tensor in tensors.items()
    }
    return {
        name: (dtype, tuple(shape))
        for held in gather_values(mine, world)
        for name, (dtype, shape) in held.items()
    }


def _check_tensors(
    manifest: Manifest,
    wanted: Mapping[str, tuple[str, tuple[int, ...]]],
    ignore: Sequence[str],
    only: str,
) -> None:
    if only == AVERAGE and not keeps_average(manifest):
        raise CheckpointError(
            "it keeps no average of the weights: a run with checkpoints.average_decay does"
        )
    saved = {
        name: tensor
        for name, tensor in manifest.tensors.items()
        if name.startswith(only) and not name.startswith(tuple(ignore))
    }
    problems = []
    missing, extra = wanted.keys() - saved.keys(), saved.keys() - wanted.keys()
    if missing:
        problems.append(f"it lacks {_listed(missing)}")
    if extra:
        problems.append(f"it holds {_listed(extra)}, for which there is no place")
    for name in sorted(wanted.keys() & saved.keys()):
        dtype, shape = wanted[name]
        if (saved[name].dtype, saved[name].shape) != (dtype, shape):
            problems.append(
                f"its {name} is {saved[name].dtype} {list(saved[name].shape)}; expected {dtype} "
                f"{list(shape)}"
            )
    if problems:
        more = [f"and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise CheckpointError("; ".join([*problems[:8], *more]))


def keeps_average(manifest: Manifest) -> bool:
    return any(name.startswith(AVERAGE) for name in manifest.tensors)


def _listed(names: Collection[str]) -> str:
    shown = sorted(names)[:8]
    more = [f"… ({len(names)} tensors)"] if len(names) > 8 else []
    return ", ".join([*shown, *more])
