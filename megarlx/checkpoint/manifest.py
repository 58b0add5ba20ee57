"""The manifest of a checkpoint: what it holds, where each part lies, and how to tell damage.

`manifest.json` is JSON with one tensor or file a line. Its last entry is the SHA-256 of all bytes
before it, so no byte of it can change unnoticed; that digest stands for the whole checkpoint,
because every other file's digest is in it (`sha256sum` gives the same).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from megarlx.checkpoint.errors import CheckpointError

NAME = "manifest.json"
FORMAT = "megarlx checkpoint"
VERSION = 1
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
FILE_NAME = re.compile(r"[a-z]+-\d{5,}\.safetensors")
DIGEST = re.compile(r"[0-9a-f]{64}")
MAX_SIZE = 2**62  # what fits in a tensor's sizes


@dataclass(frozen=True)
class Chunk:
    """A block of a tensor, stored as one entry of a file."""

    file: int  # place in the manifest's list of files
    offset: tuple[int, ...]
    size: tuple[int, ...]


@dataclass(frozen=True)
class SavedTensor:
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class SavedFile:
    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    iteration: int
    files: tuple[SavedFile, ...]
    tensors: dict[str, SavedTensor]
    state: dict[str, Any]
    digest: str = ""  # of the file; empty until it is rendered


def entry_name(name: str, shape: Sequence[int], offset: Sequence[int], size: Sequence[int]) -> str:
    """What a chunk is called in its safetensors file: a whole tensor by the tensor's own name."""
    if tuple(size) == tuple(shape):
        return name
    return f"{name}@{','.join(map(str, offset))}"


def render(manifest: Manifest) -> str:
    """The file's text; raises CheckpointError where `state` is not JSON."""

    def block(brackets: str, lines: list[str]) -> str:
        return brackets[0] + "\n" + ",\n".join(lines) + "\n" + brackets[1] if lines else brackets

    try:
        parts = {
            "format": json.dumps(FORMAT),
            "version": str(VERSION),
            "iteration": str(manifest.iteration),
            "files": block("[]", [json.dumps(asdict(file)) for file in manifest.files]),
            "tensors": block(
                "{}",
                [f"{json.dumps(n)}: {json.dumps(_entry(t))}" for n, t in manifest.tensors.items()],
            ),
            "state": json.dumps(manifest.state, allow_nan=False),
        }
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"state cannot be written as JSON: {error}") from error
    return sign("{\n" + "".join(f'"{key}": {text},\n' for key, text in parts.items()))


def _entry(tensor: SavedTensor) -> dict[str, Any]:
    chunks = [{"file": c.file, "offset": c.offset, "size": c.size} for c in tensor.chunks]
    return {"dtype": tensor.dtype, "shape": tensor.shape, "chunks": chunks}


def sign(head: str) -> str:
    return f'{head}"digest": "{hashlib.sha256(head.encode()).hexdigest()}"\n}}\n'


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks the manifest, and no other file: see `verify.py` for those."""
    path = folder / NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {folder} is not a complete checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return parse(data, str(path))


def parse(data: bytes, source: str) -> Manifest:
    head, mark, tail = data.rpartition(b'"digest": "')
    found = hashlib.sha256(head).hexdigest()
    if not mark or tail != f'{found}"\n}}\n'.encode():
        said = tail[:64].decode("ascii", "replace") if mark else "none"
        raise CheckpointError(
            f"{source} is damaged: its {len(data)} bytes have the digest {found}; it says {said!r}"
        )
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is not JSON: {error}") from error
    return _Checker(source).manifest(content, found)


class _Checker:
    """Turns parsed JSON into a Manifest; whatever does not fit is named by its place."""

    def __init__(self, source: str) -> None:
        self.source = source

    def fail(self, place: str, value: object, allowed: str) -> CheckpointError:
        text = repr(value)
        shown = text if len(text) <= 200 else text[:200] + "…"
        return CheckpointError(f"{self.source}: {place} is {shown}; expected {allowed}")

    def manifest(self, content: Any, digest: str) -> Manifest:
        keys = ["format", "version", "iteration", "files", "tensors", "state", "digest"]
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise self.fail("the content", content, f'an object with "format": "{FORMAT}"')
        version = content.get("version")
        if type(version) is not int or not 1 <= version <= VERSION:
            raise self.fail("version", version, f"1 to {VERSION}, which this megarlx can read")
        self.keys("the manifest", content, keys)
        files = tuple(
            self.file(f"files[{i}]", file) for i, file in enumerate(self.list_of(content, "files"))
        )
        names = [file.name for file in files]
        if len(set(names)) != len(names):
            raise self.fail("files", names, "different names")
        for name in ("tensors", "state"):
            if not isinstance(content[name], dict):
                raise self.fail(name, content[name], "an object")
        tensors = {
            name: self.tensor(f"tensors[{name!r}]", tensor, len(files))
            for name, tensor in content["tensors"].items()
        }
        return Manifest(
            self.whole("iteration", content["iteration"]),
            files,
            tensors,
            content["state"],
            digest,
        )

    def keys(self, place: str, value: Any, keys: list[str]) -> dict[str, Any]:
        if not isinstance(value, dict) or set(value) != set(keys):
            found = sorted(value) if isinstance(value, dict) else value
            raise self.fail(place, found, f"an object with the keys {', '.join(keys)}")
        return value

    def list_of(self, value: dict[str, Any], key: str) -> list[Any]:
        if not isinstance(value[key], list):
            raise self.fail(key, value[key], "a list")
        return value[key]

    def whole(self, place: str, value: object, least: int = 0, most: int = MAX_SIZE) -> int:
        if type(value) is not int or not least <= value <= most:
            raise self.fail(place, value, f"a whole number from {least} to {most}")
        return value

    def text(self, place: str, value: object, pattern: re.Pattern[str]) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise self.fail(place, value, f"text like {pattern.pattern}")
        return value

    def sizes(self, place: str, value: object, count: int | None, least: int) -> tuple[int, ...]:
        if not isinstance(value, list) or (count is not None and len(value) != count):
            raise self.fail(
                place, value, "a list" if count is None else f"a list of {count} numbers"
            )
        return tuple(self.whole(f"{place}[{i}]", v, least) for i, v in enumerate(value))

    def file(self, place: str, value: object) -> SavedFile:
        fields = self.keys(place, value, ["name", "bytes", "sha256"])
        return SavedFile(
            self.text(f"{place}.name", fields["name"], FILE_NAME),
            self.whole(f"{place}.bytes", fields["bytes"]),
            self.text(f"{place}.sha256", fields["sha256"], DIGEST),
        )

    def tensor(self, place: str, value: object, files: int) -> SavedTensor:
        fields = self.keys(place, value, ["dtype", "shape", "chunks"])
        if not isinstance(fields["dtype"], str) or fields["dtype"] not in DTYPES:
            raise self.fail(f"{place}.dtype", fields["dtype"], f"one of {', '.join(DTYPES)}")
        shape = self.sizes(f"{place}.shape", fields["shape"], None, 0)
        chunks = tuple(
            self.chunk(f"{place}.chunks[{i}]", chunk, len(shape), files)
            for i, chunk in enumerate(self.list_of(fields, "chunks"))
        )
        problem = tiling_problem(shape, [(c.offset, c.size) for c in chunks])
        if problem:
            raise CheckpointError(f"{self.source}: {place}: {problem}")
        return SavedTensor(fields["dtype"], shape, chunks)

    def chunk(self, place: str, value: object, dimensions: int, files: int) -> Chunk:
        fields = self.keys(place, value, ["file", "offset", "size"])
        return Chunk(
            self.whole(f"{place}.file", fields["file"], most=files - 1),
            self.sizes(f"{place}.offset", fields["offset"], dimensions, 0),
            self.sizes(f"{place}.size", fields["size"], dimensions, 1),
        )


Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset, size


def tiling_problem(shape: tuple[int, ...], boxes: Sequence[Box]) -> str | None:
    """Why the boxes do not cover a tensor of this shape exactly once; None where they do."""
    for offset, size in boxes:
        if any(a + n > whole for a, n, whole in zip(offset, size, shape, strict=True)):
            return (
                f"the block of size {list(size)} at {list(offset)} leaves the shape {list(shape)}"
            )
    covered = sum(prod(size) for _, size in boxes)
    if covered != prod(shape):
        return f"the blocks have {covered} elements; the shape {list(shape)} has {prod(shape)}"
    for one, other in _overlaps(boxes):
        return (
            f"the blocks at {list(one[0])} (size {list(one[1])}) and at {list(other[0])} "
            f"(size {list(other[1])}) overlap"
        )
    return None


def _overlaps(boxes: Sequence[Box]) -> Iterator[tuple[Box, Box]]:
    """Pairs that meet, by a sweep over the first dimension: only boxes on the same rows compare."""
    active: list[Box] = []
    for box in sorted(boxes):
        if not box[0]:
            return  # no dimension: the count of elements said all
        active = [other for other in active if other[0][0] + other[1][0] > box[0][0]]
        for other in active:
            spans = zip(*other, *box, strict=True)
            if all(a < c + m and c < a + n for a, n, c, m in spans):
                yield other, box
        active.append(box)
