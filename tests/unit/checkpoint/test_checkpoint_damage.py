"""Damage is named, and never loaded; a stranger's file runs no code."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import WORLD, flat_shards, resign, saved
from safetensors.torch import load_file

from megarlx.checkpoint import WEIGHTS_ONLY, CheckpointError, Saver, files, latest, load, verify
from megarlx.checkpoint.folder import LATEST
from megarlx.checkpoint.manifest import NAME

FILES = (NAME, "model-00000.safetensors", "optimizer-00000.safetensors")


def unchanged(shards: Any) -> bool:
    return bool((shards.shards[""] == -3.0).all())


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("seed", range(6))
def test_a_flipped_byte_in_any_file_is_named_and_nothing_is_loaded(
    tmp_path: Path, file: str, seed: int
) -> None:
    path = saved(tmp_path).path / file
    data = bytearray(path.read_bytes())
    data[random.Random(seed).randrange(len(data))] ^= 1 << seed
    path.write_bytes(data)
    shards = flat_shards(-3.0)
    with pytest.raises(CheckpointError, match=f"{file} is damaged"):
        load(path.parent, shards, WORLD)
    assert unchanged(shards)
    with pytest.raises(CheckpointError, match=f"{file} is damaged"):
        verify(path.parent)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_named_and_nothing_is_loaded(
    tmp_path: Path, file: str, share: float
) -> None:
    path = saved(tmp_path).path / file
    size = path.stat().st_size
    os.truncate(path, int(size * share))
    shards = flat_shards(-3.0)
    with pytest.raises(CheckpointError, match=file) as error:
        load(path.parent, shards, WORLD)
    assert str(int(size * share)) in str(error.value)
    assert unchanged(shards)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    path = saved(tmp_path).path / file
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{file} (is missing|cannot be read)"):
        load(path.parent, flat_shards(), WORLD)


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_the_malicious_pickle_would_work(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Malicious(marker)))  # noqa: S301  our own
    assert marker.exists()


@pytest.mark.parametrize("file", [*FILES, f"../{LATEST}"])
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_malicious_pickle_in_the_place_of_any_file_is_refused_and_not_run(
    tmp_path: Path, file: str, form: str
) -> None:
    checkpoint, marker = saved(tmp_path / "run").path, tmp_path / "marker"
    path = checkpoint / file
    if form == "pickle":
        path.write_bytes(pickle.dumps(Malicious(marker)))
    else:
        torch.save(Malicious(marker), path)
    if path.name == LATEST:
        with pytest.warns(UserWarning, match="expected a checkpoint and its digest"):
            assert latest(tmp_path / "run") == checkpoint
    else:
        shards = flat_shards(-3.0)
        with pytest.raises(CheckpointError, match=file):
            load(checkpoint, shards, WORLD)
        assert unchanged(shards)
        with pytest.raises(CheckpointError, match=file):
            latest(tmp_path / "run")
    assert not marker.exists()


@pytest.mark.parametrize("file", FILES[1:])
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_malicious_pickle_that_the_manifest_vouches_for_is_not_run_either(
    tmp_path: Path, file: str, form: str
) -> None:
    checkpoint, marker = saved(tmp_path / "run").path, tmp_path / "marker"
    path = checkpoint / file
    if form == "pickle":
        path.write_bytes(pickle.dumps(Malicious(marker)))
    else:
        torch.save(Malicious(marker), path)
    vouch_for(path)
    with pytest.raises(CheckpointError, match=f"{file} is not a safetensors file"):
        load(checkpoint, flat_shards(), WORLD)
    assert not marker.exists()


def vouch_for(path: Path) -> None:
    """Makes the manifest agree with a file that was changed."""
    manifest = path.parent / NAME
    content = json.loads(manifest.read_text())
    for file in content["files"]:
        if file["name"] == path.name:
            file["bytes"] = path.stat().st_size
            file["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    resign(path.parent, json.dumps(content))


def test_a_file_that_another_checkpoint_wrote_is_refused_by_its_entries(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path).path
    path = checkpoint / "model-00000.safetensors"
    path.write_bytes((checkpoint / "optimizer-00000.safetensors").read_bytes())
    vouch_for(path)
    with pytest.raises(CheckpointError, match=r"has no entry 'embedding.weight'"):
        load(checkpoint, flat_shards(), WORLD)


def test_loading_weights_only_needs_no_optimizer_file(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, value=2.0).path
    path = checkpoint / "optimizer-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    shards = flat_shards(-3.0)
    weights = type(shards)(shards.layout, shards.layouts, 0, {"": shards.shards[""]})
    load(checkpoint, weights, WORLD, ignore=WEIGHTS_ONLY)
    assert all(
        (values == 2.0).all()
        for tensor in weights.tensors(counted_only=True).values()
        for _, values in tensor.blocks
    )


def test_missing_and_extra_tensors_and_wrong_shapes_are_named_together(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path).path
    other = flat_shards(0.0, {"embedding.weight": (5, 4), "head.weight": (2, 2)})
    with pytest.raises(CheckpointError) as error:
        load(checkpoint, other, WORLD)
    text = str(error.value)
    assert "it lacks head.weight, optimizer/sft/exp_avg/head.weight" in text
    assert "it holds norm.weight, optimizer/sft/exp_avg/norm.weight, for which there" in text
    assert "its embedding.weight is float32 [5, 3]; expected float32 [5, 4]" in text


def test_another_type_is_refused_not_converted(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path).path
    shards = flat_shards()
    double = {prefix: shard.double() for prefix, shard in shards.shards.items()}
    with pytest.raises(CheckpointError, match=r"is float32 \[5, 3\]; expected float64 \[5, 3\]"):
        load(checkpoint, type(shards)(shards.layout, shards.layouts, 0, double), WORLD)


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_files_of_many_pieces_are_written_and_hashed_in_order(tmp_path: Path, extra: int) -> None:
    rows = 5 * files.PIECE // (4 * 64) + extra
    shards = flat_shards(0.0, {"embedding.weight": (rows, 64), "norm.weight": (3,)})
    for shard in shards.shards.values():
        shard.copy_(torch.arange(shard.numel()))
    saver = Saver(tmp_path, WORLD)
    saver.save(1, shards, {}, blocking=True)
    verify(tmp_path / "iter_00000001")
    tensors = load_file(tmp_path / "iter_00000001" / "model-00000.safetensors")
    assert torch.equal(tensors["embedding.weight"].view(-1), torch.arange(rows * 64.0))


def test_an_error_that_a_disk_tells_early_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files, "_sync_data", fails)
    shards = flat_shards(0.0, {"embedding.weight": (4 * files.PIECE // 4, 1)})
    with pytest.raises(CheckpointError, match=r"model-00000.safetensors: Input/output"):
        Saver(tmp_path, WORLD).save(1, shards, {}, blocking=True)
    assert latest(tmp_path) is None


def test_padding_is_zero_after_a_load(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path).path
    shards = flat_shards(9.0)
    load(checkpoint, shards, WORLD)
    for shard, value in zip(shards.shards.values(), (1.0, 1.5), strict=True):
        assert shard.count_nonzero() == 5 * 3 + 7
        assert shard.sum() == value * (5 * 3 + 7)
