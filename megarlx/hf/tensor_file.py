"""A safetensors file read in slices, with plain reads into memory of our own.

Not mapped: pages of a mapped file count as this process's memory for as long as it is open, and a
truncated file is found at its first missing page. Here all that the header says is checked when
the file is opened, and a slice costs its own size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarlx.hf.errors import ConversionError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
LONGEST_HEADER = 100 * 2**20  # the format's own limit


@dataclass(frozen=True)
class StoredTensor:
    dtype: torch.dtype
    shape: tuple[int, ...]
    position: int  # of its first byte in the file


class TensorFile:
    """Knows where the tensors of a file are; opens it for each read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(size - 8, LONGEST_HEADER):
                    raise ConversionError(
                        f"{path} is truncated or no safetensors file: it has {size} bytes, and its "
                        f"header would have {length}"
                    )
                text = file.read(length)
        except OSError as error:
            raise ConversionError(f"{path} cannot be read: {error.strerror}") from error
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConversionError(f"{path}: its header is not JSON: {error}") from error
        if not isinstance(header, dict):
            raise ConversionError(f"{path}: its header is no object")
        header.pop("__metadata__", None)
        self.tensors: dict[str, StoredTensor] = {}
        ends = [self._add(name, entry, 8 + length) for name, entry in header.items()]
        self._check_extent(ends, 8 + length, size)

    def _add(self, name: str, entry: Any, start: int) -> tuple[int, int]:
        try:
            kind, shape, (low, high) = entry["dtype"], entry["shape"], entry["data_offsets"]
            whole = [*shape, low, high]
        except (TypeError, KeyError, ValueError):
            raise ConversionError(f"{self.path}: the entry of {name!r} is {entry!r:.200}") from None
        if not all(type(n) is int and n >= 0 for n in whole):
            raise ConversionError(f"{self.path}: the entry of {name!r} is {entry!r:.200}")
        if not isinstance(kind, str) or kind not in DTYPES:
            raise ConversionError(
                f"{self.path}: {name!r} is of type {kind!r:.80}; allowed are {', '.join(DTYPES)}"
            )
        if high - low != prod(shape) * DTYPES[kind].itemsize:
            raise ConversionError(
                f"{self.path}: {name!r} has {high - low} bytes; shape {shape} of {kind} needs "
                f"{prod(shape) * DTYPES[kind].itemsize}"
            )
        self.tensors[name] = StoredTensor(DTYPES[kind], tuple(shape), start + low)
        return start + low, start + high

    def _check_extent(self, extents: list[tuple[int, int]], start: int, size: int) -> None:
        position = start
        for low, high in sorted(extents):
            if low != position:
                raise ConversionError(
                    f"{self.path}: its header leaves out or uses twice the bytes from "
                    f"{min(low, position)} to {max(low, position)}"
                )
            position = high
        if position != size:
            what = "is truncated" if size < position else "is too long"
            raise ConversionError(
                f"{self.path} {what}: it has {size} bytes; its header describes {position}"
            )

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        """A block of a tensor; only its own bytes are read, row by row where it is no whole row."""
        stored = self.tensors[name]
        item = stored.dtype.itemsize
        inner = prod(stored.shape[1:])  # elements of a row
        whole_rows = tuple(size[1:]) == stored.shape[1:]
        if len(stored.shape) > 2 and not whole_rows:
            raise ConversionError(f"{self.path}: {name!r} has {len(stored.shape)} dimensions")
        out = torch.empty(prod(size) * item, dtype=torch.uint8)
        view = out.numpy().data
        first = start[0] if start else 0
        with open(self.path, "rb", buffering=0) as file:
            if whole_rows:
                self._fill(file.fileno(), view, stored.position + first * inner * item)
            else:
                width = size[1] * item
                for row in range(size[0]):
                    element = (first + row) * inner + start[1]
                    part = view[row * width : (row + 1) * width]
                    self._fill(file.fileno(), part, stored.position + element * item)
        return out.view(stored.dtype).view(tuple(size))

    def _fill(self, file: int, view: memoryview, position: int) -> None:
        while view:
            count = os.preadv(file, [view], position)
            if not count:
                raise ConversionError(f"{self.path} became shorter while it was read")
            view, position = view[count:], position + count
