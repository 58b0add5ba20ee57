"""What a checkpoint or a folder of Hugging Face holds, and how two of them differ."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from megarlx.checkpoint.verify import check_digests
from megarlx.hf.errors import ConversionError
from megarlx.hf.sources import (
    CheckpointSource,
    HuggingFaceFolder,
    TensorSource,
    is_hugging_face,
    parts,
)
from megarlx.hf.trunk import find_checkpoint, run_of


def open_source(text: str, *, newest: bool = False) -> CheckpointSource | HuggingFaceFolder:
    """RUN[@ITER], a checkpoint's folder, or a folder of Hugging Face; `newest` as below."""
    path = Path(text)
    if is_hugging_face(path):
        return HuggingFaceFolder(path)
    return CheckpointSource(find_checkpoint(text, newest=newest))


def describe(source: CheckpointSource | HuggingFaceFolder) -> Iterator[str]:
    """Line by line; the tensors come last."""
    if isinstance(source, HuggingFaceFolder):
        yield f"{source.folder}: {source.published.architecture}"
        yield f"model     {json.dumps(source.config.model_dump(exclude_none=True))}"
    else:
        yield from _describe_checkpoint(source)
    elements = sum(prod(shape) for shape in source.shapes.values())
    size = sum(prod(s) * source.dtypes[name].itemsize for name, s in source.shapes.items())
    yield f"tensors   {len(source.shapes)}, {elements:,} numbers, {size / 1e6:,.1f} MB"
    longest = max(map(len, source.shapes))
    for name, shape in source.shapes.items():
        dtype = str(source.dtypes[name]).removeprefix("torch.")
        blocks = ""
        if isinstance(source, CheckpointSource):
            count = len(source.manifest.tensors[name].chunks)
            blocks = f"  in {count} blocks" if count > 1 else ""
        yield f"  {name:<{longest}}  {dtype:<8}  {list(shape)}{blocks}"


def _describe_checkpoint(source: CheckpointSource) -> Iterator[str]:
    manifest = source.manifest
    yield f"{source.path}: iteration {manifest.iteration}"
    yield f"digest    {manifest.digest}"
    state = manifest.state.get("run", {})
    yield f"tokens    {json.dumps(state.get('tokens'))}"
    if "converted" in state:
        yield f"converted {json.dumps(state['converted'])}"
    yield f"state     {json.dumps(manifest.state)[:500]}"
    lineage = run_of(source.path) / "lineage.json"
    if lineage.is_file():
        yield f"lineage   {json.dumps(json.loads(lineage.read_text(encoding='utf-8')))}"
    yield f"files     {len(manifest.files)}"
    for file in manifest.files:
        yield f"  {file.name}  {file.bytes:,} bytes  sha256 {file.sha256}"


def check(source: CheckpointSource | HuggingFaceFolder) -> str:
    """Reads every byte; raises where one is not what was written."""
    if isinstance(source, CheckpointSource):
        check_digests(source.path, source.manifest.files)
        return f"{len(source.manifest.files)} files have the digests of the manifest"
    for name in source.shapes:
        _norms(source, None, name)
    return "a folder of Hugging Face has no digests: its files are whole, every number was read"


@dataclass(frozen=True)
class Difference:
    """Of one tensor: Frobenius norms of both sides and of what lies between them."""

    name: str
    one: float
    other: float
    between: float

    @property
    def relative(self) -> float:
        if self.between == 0.0:
            return 0.0
        return self.between / self.one if self.one else math.inf


def differences(one: TensorSource, other: TensorSource) -> Iterator[Difference]:
    """Of all tensors that both hold, a part at a time, computed in fp64."""
    for name in one.shapes:
        if name in other.shapes:
            if one.shapes[name] != other.shapes[name]:
                raise ConversionError(
                    f"{name} is {list(one.shapes[name])} on one side and "
                    f"{list(other.shapes[name])} on the other"
                )
            yield Difference(name, *_norms(one, other, name))


def _norms(one: TensorSource, other: TensorSource | None, name: str) -> tuple[float, float, float]:
    sums = [0.0, 0.0, 0.0]
    shape = one.shapes[name]
    for start, size in parts(shape, (0,) * len(shape), shape, itemsize=8):
        a = one.read(name, start, size).double()
        b = a if other is None else other.read(name, start, size).double()
        for i, values in enumerate((a, b, a - b)):
            sums[i] += values.square().sum().item()
    return math.sqrt(sums[0]), math.sqrt(sums[1]), math.sqrt(sums[2])


def only_in(one: TensorSource, other: TensorSource) -> list[str]:
    return sorted(one.shapes.keys() - other.shapes.keys())
