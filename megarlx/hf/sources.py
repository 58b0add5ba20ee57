"""A folder of Hugging Face, or a checkpoint of ours, as tensors in model space."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megarlx.checkpoint.folder import check_sizes
from megarlx.checkpoint.loading import WEIGHTS_ONLY, keeps_average
from megarlx.checkpoint.manifest import DTYPES, Manifest, entry_name, read_manifest
from megarlx.checkpoint.storage import AVERAGE
from megarlx.config.model import ModelConfig
from megarlx.config.parameters import published_names
from megarlx.hf.config_map import model_config, read_family, read_json
from megarlx.hf.errors import ConversionError
from megarlx.hf.families import NOT_WEIGHTS
from megarlx.hf.tensor_file import TensorFile

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle)")
PART_BYTES = 2**20  # of a tensor that are in memory at a time, and some of them a few times


class TensorSource(Protocol):
    """Tensors by our names; `shapes` and `dtypes` have the same keys."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor: ...


def is_hugging_face(folder: Path) -> bool:
    """A run may have a config.json of its own only beside its checkpoints."""
    return (folder / "config.json").is_file() and not (folder / "checkpoints").exists()


class HuggingFaceFolder:
    """Config and tensors of a folder; everything but the values is checked when it is opened."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ConversionError(f"{folder} is no folder")
        self.folder = folder
        self.content = read_json(folder / "config.json")
        source = str(folder / "config.json")
        self.published = read_family(self.content, source)[1]
        self.config = model_config(self.content, source)
        files = {name: TensorFile(folder / name) for name in _files(folder)}
        place = {name: file for file in files.values() for name in file.tensors}
        held = sum(len(file.tensors) for file in files.values())
        if held != len(place):
            raise ConversionError(f"{folder}: {held - len(place)} tensors are in two files")
        if self.config.layers > held:  # so many that to list their tensors would never end
            raise ConversionError(
                f"{folder}: config.json says num_hidden_layers {self.config.layers}; the files "
                f"hold {held} tensors"
            )
        names = published_names(self.config)
        self._check_index(place)
        self._check_names(place, names)
        self.shapes = self.config.tensor_shapes()
        self._tensors = {ours: (place[theirs], theirs) for ours, theirs in names.items()}
        for ours, (file, theirs) in self._tensors.items():
            found = file.tensors[theirs].shape
            if found != self.shapes[ours]:
                raise ConversionError(
                    f"{file.path}: {theirs} has the shape {list(found)}; config.json makes it "
                    f"{list(self.shapes[ours])}"
                )
        self.dtypes = {o: f.tensors[theirs].dtype for o, (f, theirs) in self._tensors.items()}
        self._check_tied(place)

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        file, theirs = self._tensors[name]
        return file.read(theirs, start, size)

    def _check_index(self, place: Mapping[str, TensorFile]) -> None:
        path = self.folder / INDEX
        if not path.exists():
            return
        listed = read_json(path)["weight_map"]  # an object of texts: `_files` saw to it
        wrong = [
            f"{name} in {file}"
            for name, file in listed.items()
            if name not in place or place[name].path.name != file
        ]
        if wrong:
            raise ConversionError(f"{path} names tensors that are not there: {_shown(wrong)}")

    def _check_names(self, place: Mapping[str, TensorFile], names: Mapping[str, str]) -> None:
        missing = set(names.values()) - set(place)
        extra = {n for n in set(place) - set(names.values()) if not NOT_WEIGHTS.fullmatch(n)}
        if self.config.tied_embeddings:
            extra.discard("lm_head.weight")
        problems = []
        if missing:
            problems.append(f"it lacks {_shown(missing)}")
        if extra:
            problems.append(f"it holds {_shown(extra)}, for which there is no place")
        if problems:
            raise ConversionError(
                f"{self.folder} is no {self.published.architecture}: {'; '.join(problems)}"
            )

    def _check_tied(self, place: Mapping[str, TensorFile]) -> None:
        """Some tied models carry the head a second time. It must be the embedding."""
        if not (self.config.tied_embeddings and "lm_head.weight" in place):
            return
        head = place["lm_head.weight"]
        shape = self.shapes["embedding.weight"]
        same = head.tensors["lm_head.weight"].shape == shape
        for start, size in parts(shape, (0, 0), shape) if same else ():
            same = same and torch.equal(
                head.read("lm_head.weight", start, size),
                self.read("embedding.weight", start, size),
            )
        if not same:
            raise ConversionError(
                f"{self.folder}: config.json says tie_word_embeddings, but lm_head.weight is not "
                "the embedding"
            )


def _files(folder: Path) -> list[str]:
    if (folder / INDEX).exists():
        listed = read_json(folder / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(f, str) for f in listed.values()):
            raise ConversionError(f"{folder / INDEX} has no weight_map")
        files = sorted(set(listed.values()))
        for name in files:
            if Path(name).name != name:
                raise ConversionError(
                    f"{folder / INDEX} names the file {name!r} outside its folder"
                )
            if PICKLES.fullmatch(name):
                raise ConversionError(_pickled(folder, name))
        return files
    if (folder / SINGLE).exists():
        return [SINGLE]
    pickled = sorted(p.name for p in folder.iterdir() if PICKLES.fullmatch(p.name))
    if pickled:
        raise ConversionError(_pickled(folder, pickled[0]))
    raise ConversionError(f"{folder} holds neither {SINGLE} nor {INDEX}")


def _pickled(folder: Path, name: str) -> str:
    return (
        f"{folder / name} is a pickle, and reading one runs whatever code is in it: it is not "
        "opened. Where you trust it, load it with transformers and save_pretrained it as "
        "safetensors"
    )


class CheckpointSource:
    """A checkpoint of ours: the weights, and beside them moments and reference policies."""

    def __init__(self, checkpoint: Path) -> None:
        self.path = checkpoint
        self.manifest: Manifest = read_manifest(checkpoint)
        check_sizes(checkpoint, self.manifest)
        self.shapes = {name: tensor.shape for name, tensor in self.manifest.tensors.items()}
        self.dtypes = {name: DTYPES[tensor.dtype] for name, tensor in self.manifest.tensors.items()}
        self._files = [TensorFile(checkpoint / file.name) for file in self.manifest.files]

    def check_model(self, config: ModelConfig) -> None:
        """The weights are those of this model, no more and no fewer."""
        wanted = config.tensor_shapes()
        held = {n: s for n, s in self.shapes.items() if not n.startswith(WEIGHTS_ONLY)}
        if held != wanted:
            wrong = {n for n in held.keys() & wanted.keys() if held[n] != wanted[n]}
            different = wrong | (held.keys() ^ wanted.keys())
            raise ConversionError(
                f"{self.path} is not of the model in resolved.json: {_shown(different)}"
            )

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        """Put together from the stored blocks that meet the block asked for."""
        tensor = self.manifest.tensors[name]
        out: Tensor | None = None
        for chunk in tensor.chunks:
            low = [max(a, b) for a, b in zip(start, chunk.offset, strict=True)]
            high = [
                min(a + m, b + n)
                for a, m, b, n in zip(start, size, chunk.offset, chunk.size, strict=True)
            ]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            entry = entry_name(name, tensor.shape, chunk.offset, chunk.size)
            file = self._files[chunk.file]
            stored = file.tensors.get(entry)
            if stored is None or stored.shape != chunk.size or stored.dtype != self.dtypes[name]:
                raise ConversionError(f"{file.path} does not hold {entry!r} as its manifest says")
            extent = [b - a for a, b in zip(low, high, strict=True)]
            within = [a - b for a, b in zip(low, chunk.offset, strict=True)]
            part = file.read(entry, within, extent)
            if extent == list(size):
                return part
            if out is None:
                out = torch.empty(tuple(size), dtype=self.dtypes[name])
            place = zip(low, high, start, strict=True)
            out[tuple(slice(a - c, b - c) for a, b, c in place)] = part
        assert out is not None, "a manifest's blocks cover its tensors"
        return out


class AveragedSource(CheckpointSource):
    """The moving average of the weights that a checkpoint keeps, under the weights' names."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint)
        if not keeps_average(self.manifest):
            raise ConversionError(
                f"{checkpoint} keeps no average of the weights: a run with "
                "checkpoints.average_decay does"
            )
        held = [name for name in self.shapes if name.startswith(AVERAGE)]
        self.shapes = {name.removeprefix(AVERAGE): self.shapes[name] for name in held}
        self.dtypes.update({name.removeprefix(AVERAGE): self.dtypes[name] for name in held})

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        return super().read(AVERAGE + name, start, size)


Block = tuple[tuple[int, ...], tuple[int, ...]]  # start, size


def parts(
    shape: Sequence[int], start: Sequence[int], size: Sequence[int], itemsize: int = 4
) -> list[Block]:
    """A block cut along its rows into blocks of at most PART_BYTES, at least a row each."""
    if not shape:
        return [((), ())]
    row = itemsize
    for n in size[1:]:
        row *= n
    rows = max(1, PART_BYTES // max(row, 1))
    return [
        ((first, *start[1:]), (min(rows, start[0] + size[0] - first), *size[1:]))
        for first in range(start[0], start[0] + size[0], rows)
    ]


def _shown(names: Collection[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:6]) + (f", … ({len(listed)} in all)" if len(listed) > 6 else "")
