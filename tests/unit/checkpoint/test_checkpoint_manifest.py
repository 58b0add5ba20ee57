"""The manifest comes back as it was written; anything else is an error that names the place."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_cases import WORLD, flat_shards, resign, saved
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megarlx.checkpoint import CheckpointError, load, read_manifest, verify
from megarlx.checkpoint.manifest import (
    NAME,
    Chunk,
    Manifest,
    SavedFile,
    SavedTensor,
    parse,
    render,
    tiling_problem,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(deadline=None)
@given(state=st.dictionaries(st.text(), JSON, max_size=4), iteration=st.integers(0, 10**9))
def test_a_manifest_comes_back_as_it_was_written(state: dict[str, Any], iteration: int) -> None:
    manifest = Manifest(
        iteration,
        (SavedFile("model-00000.safetensors", 60, "0" * 64),),
        {'a "name" é': SavedTensor("float32", (3, 5), (Chunk(0, (0, 0), (3, 5)),))},
        state,
    )
    found = parse(render(manifest).encode(), "manifest")
    assert (found.iteration, found.files, found.tensors, found.state) == (
        iteration,
        manifest.files,
        manifest.tensors,
        state,
    )


@pytest.mark.parametrize("state", [{"loss": float("nan")}, {"x": {1, 2}}, {"x": b"bytes"}])
def test_a_state_that_is_not_json_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="state cannot be written as JSON"):
        render(Manifest(0, (), {}, state))


boxes = st.tuples(
    st.tuples(st.integers(0, 4), st.integers(0, 4)), st.tuples(st.integers(1, 4), st.integers(1, 4))
)


@settings(deadline=None)
@given(shape=st.tuples(st.integers(1, 5), st.integers(1, 5)), found=st.lists(boxes, max_size=5))
def test_a_tiling_is_right_exactly_when_every_element_is_covered_once(
    shape: tuple[int, int], found: list[Any]
) -> None:
    count = np.zeros((10, 10), int)
    for (a, b), (n, m) in found:
        count[a : a + n, b : b + m] += 1
    inside = np.zeros_like(count)
    inside[: shape[0], : shape[1]] = 1
    assert (tiling_problem(shape, found) is None) == bool((count == inside).all())


@settings(deadline=None)
@given(
    rows=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    columns=st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_a_grid_of_blocks_is_a_tiling_until_one_is_moved(
    rows: list[int], columns: list[int]
) -> None:
    at = [np.cumsum([0, *cuts]).tolist() for cuts in (rows, columns)]
    cells = itertools.product(range(len(rows)), range(len(columns)))
    grid = [((at[0][i], at[1][j]), (rows[i], columns[j])) for i, j in cells]
    shape = (sum(rows), sum(columns))
    assert tiling_problem(shape, grid) is None
    if len(grid) > 1:
        first = grid[0]
        assert tiling_problem(shape, [*grid[:-1], first]) is not None


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = (
        value.items() if isinstance(value, dict) else enumerate(value)
        if isinstance(value, list) else []
    )  # fmt: skip
    return [path, *(p for key, child in children for p in _places(child, (*path, key)))]


def _changed(content: Any, path: tuple[Any, ...], value: Any, remove: bool) -> Any:
    if not path:
        return value
    content = copy.deepcopy(content)
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    if remove:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return content


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_changed_manifest_with_a_digest_that_fits_is_refused_or_loads_what_was_saved(
    tmp_path: Path, data: st.DataObject
) -> None:
    checkpoint = tmp_path / "iter_00000001"
    if not checkpoint.exists():
        saved(tmp_path)
        (tmp_path / "original").write_text((checkpoint / NAME).read_text())
    content = json.loads((tmp_path / "original").read_text())
    del content["digest"]
    path = data.draw(st.sampled_from(_places(content)))
    value = data.draw(JSON | st.sampled_from([-1, 2**63, 10**400, 1e400, "../model", [0], [5, 3]]))
    changed = _changed(content, path, value, data.draw(st.booleans()))
    text = json.dumps(changed)
    resign(checkpoint, (text[:-1] if text.endswith("}") else text) + ', "digest": "')
    shards = flat_shards(-3.0)
    try:
        load(checkpoint, shards, WORLD)
    except CheckpointError as error:
        assert str(checkpoint) in str(error)
        return
    for name, tensor in shards.tensors(counted_only=True).items():
        expected = 1.5 if name.startswith("optimizer/") else 1.0
        assert all((values == expected).all() for _, values in tensor.blocks), path


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.integers(0), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_in_a_manifest_is_noticed(
    tmp_path: Path, place: int, bit: int
) -> None:
    checkpoint = tmp_path / "iter_00000001"
    if not checkpoint.exists():
        saved(tmp_path)
    data = bytearray((checkpoint / NAME).read_bytes())
    data[place % len(data)] ^= 1 << bit
    with pytest.raises(CheckpointError, match="is damaged"):
        parse(bytes(data), "manifest")


@pytest.mark.parametrize("nesting", [10, 100_000])
def test_deep_nesting_is_no_crash(tmp_path: Path, nesting: int) -> None:
    checkpoint = saved(tmp_path).path
    text = (checkpoint / NAME).read_text().replace(
        '"cursor": 1', f'"cursor": {"[" * nesting}{"]" * nesting}'
    )  # fmt: skip
    resign(checkpoint, text)
    if nesting == 10:
        assert verify(checkpoint).iteration == 1
    else:
        with pytest.raises(CheckpointError, match="is not JSON"):
            verify(checkpoint)


def test_a_newer_format_is_refused_by_its_number(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path).path
    text = (checkpoint / NAME).read_text()
    resign(checkpoint, text.replace('"version": 1', '"version": 2'))
    with pytest.raises(CheckpointError, match=r"version is 2; expected 1 to 1"):
        read_manifest(checkpoint)
