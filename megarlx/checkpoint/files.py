"""Files that are whole or not there: safetensors written with their digest, folders synced."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megarlx.checkpoint.errors import CheckpointError
from megarlx.checkpoint.manifest import SavedFile

PIECE = 16 * 2**20  # bytes that are written, and hashed, at a time

# safetensors' names of the types that are written; a checkpoint holds no F16, an export may
TYPE_NAMES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


@dataclass(frozen=True)
class Entry:
    """A tensor for a safetensors file; the values are asked for when their turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(path: Path, entries: Sequence[Entry], values: Iterable[Tensor]) -> SavedFile:
    """Writes and syncs a new file; its digest is taken on the way, not by reading it again."""

    def whole() -> Iterator[list[Tensor]]:
        for entry, tensor in zip(entries, values, strict=True):
            if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
                raise ValueError(
                    f"{entry.name} is {tuple(tensor.shape)} {tensor.dtype}; planned was "
                    f"{entry.shape} {entry.dtype}"
                )
            yield [tensor]

    return write_safetensors_in_parts(path, entries, whole())


def write_safetensors_in_parts(
    path: Path,
    entries: Sequence[Entry],
    parts: Iterable[Iterable[Tensor]],
    waiting_pieces: int = 64,
) -> SavedFile:
    """The same for entries whose values come as several tensors, in the order of their elements.

    At most `waiting_pieces` pieces wait for their digest, and are held in memory for it.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": TYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.bytes],
        }
        position += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values after it are then aligned
    try:
        with (
            open(path, "xb", buffering=0) as file,
            _Stream(file.fileno(), waiting_pieces) as stream,
        ):
            stream.write(memoryview(len(text).to_bytes(8, "little") + text))
            for entry, tensors in zip(entries, parts, strict=True):
                written = 0
                for tensor in tensors:
                    if tensor.dtype != entry.dtype:
                        raise ValueError(
                            f"{entry.name} has a part of {tensor.dtype}; planned was {entry.dtype}"
                        )
                    stream.write(_bytes_of(tensor))
                    written += tensor.nbytes
                if written != entry.bytes:
                    raise ValueError(
                        f"the parts of {entry.name} have {written} bytes; planned was {entry.bytes}"
                    )
            digest = stream.finish()
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"writing {path}: {error.strerror or error}") from error
    return SavedFile(path.name, size, digest)


_sync_data: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)  # not on every system


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


class _Stream:
    """Writes a file while one thread hashes what was written and another sends it to the disk.

    Syncing only at the end would leave the disk idle during the writing, and hashing in between
    would leave it idle during the hashing: this is about twice as fast.
    """

    def __init__(self, file: int, waiting_pieces: int) -> None:
        self._file, self._waiting_pieces = file, waiting_pieces
        self._digest = hashlib.sha256()
        self._hashing, self._syncing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._hashed: deque[Future[None]] = deque()
        self._synced: list[Future[None]] = []
        self._unsynced = 0

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._hashing.shutdown()
        self._syncing.shutdown()

    def write(self, data: memoryview) -> None:
        while data:
            piece = data[: os.write(self._file, data[:PIECE])]
            data = data[len(piece) :]
            self._hashed.append(self._hashing.submit(self._digest.update, piece))
            if len(self._hashed) > self._waiting_pieces:  # each may hold memory of its own
                self._hashed.popleft().result()
            self._unsynced += len(piece)
            if self._unsynced >= PIECE and all(future.done() for future in self._synced[-1:]):
                self._synced.append(self._syncing.submit(_sync_data, self._file))
                self._unsynced = 0

    def finish(self) -> str:
        """The digest, once everything is on the disk, which tells each of its errors only once."""
        for future in (*self._hashed, *self._synced):
            future.result()
        os.fsync(self._file)
        return self._digest.hexdigest()


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(PIECE))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_new(path: Path, text: str) -> None:
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"writing {path}: {error.strerror or error}") from error


def replace_text(path: Path, text: str) -> None:
    """The old content or the new, at any moment."""
    temporary = path.with_name(f".{path.name}.new")
    with suppress(FileNotFoundError):
        temporary.unlink()
    write_new(temporary, text)
    os.replace(temporary, path)
    sync_folder(path.parent)


class SafetensorsFile:
    """A file mapped into memory: what is not used is never read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            self._names = frozenset(self._file.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is not a safetensors file: {error}") from error

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if name not in self._names:
            raise CheckpointError(f"{self.path} has no entry {name!r}, which its manifest lists")
        tensor = self._file.get_tensor(name)
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
            raise CheckpointError(
                f"{self.path}: {name!r} is {list(tensor.shape)} {tensor.dtype}; its manifest says "
                f"{list(shape)} {dtype}"
            )
        return tensor
