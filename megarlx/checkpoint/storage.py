"""torch DCP's storage interface over safetensors files and the JSON manifest.

A rank writes `model-00003.safetensors` with its blocks of the weights and, where there are any,
`optimizer-00003.safetensors` with those of moments, `frozen-00003.safetensors` with those of
reference policies and `average-00003.safetensors` with those of the weights' moving average.
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from megarlx.checkpoint import manifest as manifests
from megarlx.checkpoint.files import (
    Entry,
    SafetensorsFile,
    sync_folder,
    write_new,
    write_safetensors,
)
from megarlx.checkpoint.manifest import (
    DTYPES,
    Chunk,
    Manifest,
    SavedFile,
    SavedTensor,
    entry_name,
)
from megarlx.checkpoint.planner import DTYPE_NAMES

# What the names of tensors begin with that are no weights to train.
OPTIMIZER, FROZEN, AVERAGE = BESIDE = "optimizer/", "frozen/", "average/"
KINDS = ("model", *(kind[:-1] for kind in BESIDE))  # of tensors, in the order of a rank's files


def kind_of(tensor: str) -> str:
    """Tensors of two kinds never share a file: loading weights alone reads no more."""
    return next((k[:-1] for k in BESIDE if tensor.startswith(k)), KINDS[0])


def file_name(tensor: str, rank: int) -> str:
    return f"{kind_of(tensor)}-{rank:05d}.safetensors"


def _done(value: Any) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


class SafetensorsWriter(StorageWriter):
    """Writes one rank's files and, on the coordinator, the manifest: one folder, one use."""

    def __init__(self, folder: Path, rank: int, plans: list[SavePlan]) -> None:
        self.folder, self.rank, self.plans = folder, rank, plans
        self.iteration = 0
        self.state: dict[str, Any] = {}

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        if checkpoint_id is not None:
            self.folder = Path(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass  # `folder` was made by the saver, on the one rank that may

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """One result a file: its name, its size and its digest."""
        items = defaultdict(list)
        for item in plan.items:
            items[file_name(item.index.fqn, self.rank)].append(item)
        results = []
        for name, held in items.items():
            entries = []
            for item in held:
                data = item.tensor_data
                assert data is not None
                size = tuple(data.chunk.sizes)
                entry = entry_name(item.index.fqn, data.size, data.chunk.offsets, size)
                entries.append(Entry(entry, data.properties.dtype, size))
            values = (planner.resolve_data(item) for item in held)
            file = write_safetensors(self.folder / name, entries, values)  # type: ignore[arg-type]
            results.append(WriteResult(MetadataIndex(file.name), file.bytes, file.sha256))
        sync_folder(self.folder)
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes the manifest: from then on the folder is a checkpoint."""
        files = [
            SavedFile(result.index.fqn, result.size_in_bytes, result.storage_data)
            for rank in results
            for result in rank
        ]
        place = {file.name: i for i, file in enumerate(files)}
        chunks: dict[str, list[Chunk]] = defaultdict(list)
        for rank, plan in enumerate(self.plans):
            for item in plan.items:
                assert item.tensor_data is not None
                chunk = item.tensor_data.chunk
                file = place[file_name(item.index.fqn, rank)]
                chunks[item.index.fqn].append(Chunk(file, tuple(chunk.offsets), tuple(chunk.sizes)))
        tensors = {}
        for name in sorted(metadata.state_dict_metadata):
            saved = metadata.state_dict_metadata[name]
            assert isinstance(saved, TensorStorageMetadata)
            dtype = DTYPE_NAMES[saved.properties.dtype]
            tensors[name] = SavedTensor(dtype, tuple(saved.size), tuple(chunks[name]))
        text = manifests.render(Manifest(self.iteration, tuple(files), tensors, self.state))
        write_new(self.folder / manifests.NAME, text)
        sync_folder(self.folder)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return Path(checkpoint_id).parent.is_dir()


class SafetensorsReader(StorageReader):
    """Reads the blocks that a plan names, one at a time, out of mapped files."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        if checkpoint_id is not None:
            self.folder = Path(checkpoint_id)
            self.manifest = manifests.read_manifest(self.folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(DTYPES[tensor.dtype]),
                    torch.Size(tensor.shape),
                    [
                        ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.size))
                        for c in tensor.chunks
                    ],
                )
                for name, tensor in self.manifest.tensors.items()
            }
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        pass  # files are opened when their turn comes

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        items = defaultdict(list)
        for item in plan.items:
            tensor = self.manifest.tensors[item.storage_index.fqn]
            index = item.storage_index.index
            assert index is not None
            items[tensor.chunks[index].file].append((item, tensor, tensor.chunks[index]))
        for file, reads in sorted(items.items()):
            opened = SafetensorsFile(self.folder / self.manifest.files[file].name)
            for item, tensor, chunk in reads:
                name = entry_name(item.storage_index.fqn, tensor.shape, chunk.offset, chunk.size)
                stored = opened.tensor(name, chunk.size, DTYPES[tensor.dtype])
                window = zip(item.storage_offsets, item.lengths, strict=True)
                part = stored[tuple(slice(start, start + length) for start, length in window)]
                target = planner.resolve_tensor(item)
                target.copy_(part)
                planner.commit_tensor(item, target)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return (Path(checkpoint_id) / manifests.NAME).is_file()
