"""A save is all or nothing, `latest` moves last, and the training waits for a copy only."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import WORLD, flat_shards, saved

from megarlx.checkpoint import (
    CheckpointError,
    FlatShards,
    Retention,
    Saver,
    iterations,
    latest,
    load,
    refer,
    release,
    verify,
)
from megarlx.checkpoint.folder import LATEST, REPLACED


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def fill_(shards: FlatShards, value: float) -> None:
    for shard in shards.shards.values():
        shard.fill_(value)


def save_whole(saver: Saver, iteration: int, shards: FlatShards, blocking: bool) -> None:
    saver.save(iteration, shards, {}, blocking=blocking)
    saver.wait()


def loaded_value(checkpoint: Path) -> float:
    """The one number that all weights of the checkpoint are."""
    shards = flat_shards(-3.0)
    load(checkpoint, shards, WORLD)
    tensors = shards.tensors(counted_only=True).values()
    found = {v for tensor in tensors for _, values in tensor.blocks for v in values.unique()}
    values = {float(v) for v in found}
    assert len(values) == 1
    return values.pop()


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing waits for this event."""
    event = threading.Event()
    write = os.write

    def waits(file: int, data: memoryview) -> int:
        if threading.current_thread() is not threading.main_thread():
            event.wait(20)
        return write(file, data)

    monkeypatch.setattr("megarlx.checkpoint.files.os.write", waits)
    return event


def test_a_background_save_holds_what_the_shards_were_when_it_began(
    tmp_path: Path, slow_disk: threading.Event
) -> None:
    shards, saver = flat_shards(), Saver(tmp_path, WORLD)
    fill_(shards, 1.0)
    saver.save(1, shards, {})
    fill_(shards, 2.0)  # training goes on
    assert saver.poll() is None
    assert saver.under_way
    assert iterations(tmp_path) == []
    assert LATEST not in names(tmp_path)
    slow_disk.set()
    found = saver.wait()
    assert found is not None
    assert not saver.under_way
    assert found.path == latest(tmp_path) == tmp_path / "iter_00000001"
    assert loaded_value(found.path) == 1.0
    assert verify(found.path).digest == found.digest
    assert names(tmp_path) == {"iter_00000001", LATEST}


def test_a_second_save_waits_for_the_first_and_uses_its_buffers(
    tmp_path: Path, slow_disk: threading.Event
) -> None:
    shards, saver = flat_shards(), Saver(tmp_path, WORLD)
    fill_(shards, 1.0)
    first = saver.save(1, shards, {})
    threading.Timer(0.3, slow_disk.set).start()
    fill_(shards, 2.0)
    second = saver.save(2, shards, {})
    assert first.waited_seconds < 0.1 < 0.25 < second.waited_seconds
    assert iterations(tmp_path) == [1]
    saver.wait()
    assert [loaded_value(tmp_path / f"iter_0000000{i}") for i in (1, 2)] == [1.0, 2.0]
    assert second.bytes == sum(s.nbytes for s in shards.shards.values())


def test_the_pause_of_a_background_save_leaves_out_the_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write

    def slow(file: int, data: memoryview) -> int:
        time.sleep(0.1)
        return write(file, data)

    monkeypatch.setattr("megarlx.checkpoint.files.os.write", slow)
    shards, saver = flat_shards(), Saver(tmp_path, WORLD)
    blocking = saver.save(1, shards, {}, blocking=True)
    background = saver.save(2, shards, {})
    saver.wait()
    # two files, each a header and two tensors
    assert background.seconds < 0.2 < 0.5 < blocking.seconds


@pytest.mark.parametrize("when", ["model-00000", "optimizer-00000", "manifest.json", "latest"])
@pytest.mark.parametrize("blocking", [False, True])
def test_a_full_disk_leaves_the_last_checkpoint_good_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, blocking: bool
) -> None:
    shards, saver = flat_shards(), Saver(tmp_path, WORLD)
    fill_(shards, 1.0)
    saver.save(1, shards, {}, blocking=True)

    def full(descriptor: int) -> None:
        if when in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("megarlx.checkpoint.files.os.fsync", full)
    with pytest.raises(CheckpointError) as error:
        save_whole(saver, 2, shards, blocking)
    text = str(error.value)
    assert "No space left on device" in text
    assert when in text
    assert f"the last good checkpoint is {tmp_path / 'iter_00000001'}" in text
    monkeypatch.undo()
    assert latest(tmp_path) == tmp_path / "iter_00000001"
    assert loaded_value(tmp_path / "iter_00000001") == 1.0
    fill_(shards, 3.0)  # and when there is room again, saving works again
    saver.save(3, shards, {}, blocking=True)
    assert latest(tmp_path) == tmp_path / "iter_00000003"
    assert not any(name.startswith(".") for name in names(tmp_path))


def test_an_error_in_the_background_is_raised_by_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("the disk is on fire")

    shards, saver = flat_shards(), Saver(tmp_path, WORLD)
    monkeypatch.setattr("megarlx.checkpoint.storage.write_safetensors", broken)
    saver.save(1, shards, {})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"saving iteration 1 .*RuntimeError: .* on fire"):
        saver.save(2, shards, {})
    assert iterations(tmp_path) == []
    saver.save(2, shards, {}, blocking=True)
    assert iterations(tmp_path) == [2]


@pytest.mark.parametrize(
    ("iteration", "state", "message"),
    [
        (-1, {}, "iteration is -1"),
        (1, {"x": float("inf")}, "cannot be written as JSON"),
        (1, {"x": (1, 2)}, "would come back changed"),
        (1, {"x": {1: 2}}, "would come back changed"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(
    tmp_path: Path, iteration: int, state: dict[str, Any], message: str
) -> None:
    saver = Saver(tmp_path / "checkpoints", WORLD)
    with pytest.raises(CheckpointError, match=message):
        saver.save(iteration, flat_shards(), state)
    assert not saver.under_way
    assert not (tmp_path / "checkpoints").exists()


def test_what_a_killed_save_left_behind_is_cleared_by_the_next(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    for name in (".saving-iter_00000002-12345678", ".deleting-iter_00000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model-00000.safetensors").write_bytes(b"half")
    assert latest(tmp_path) == tmp_path / "iter_00000001"
    saved(tmp_path, 2)
    assert names(tmp_path) == {"iter_00000001", "iter_00000002", LATEST}


def test_saving_an_iteration_again_replaces_it(tmp_path: Path) -> None:
    saved(tmp_path, 1, value=1.0)
    found = saved(tmp_path, 1, value=2.0)
    assert names(tmp_path) == {"iter_00000001", LATEST}
    assert verify(found.path).digest == found.digest
    assert latest(tmp_path) == found.path


def test_a_replacement_that_was_killed_half_way_is_undone(tmp_path: Path) -> None:
    found = saved(tmp_path, 1).path
    found.rename(tmp_path / f"{REPLACED}{found.name}")
    with pytest.warns(UserWarning, match="Going on from"):
        assert latest(tmp_path) == found
    assert verify(found).iteration == 1


def _absent(folder: Path) -> None:
    (folder / LATEST).unlink()


def _nowhere(folder: Path) -> None:
    (folder / LATEST).write_text(f"iter_00000009 {'0' * 64}\n")


def _other_digest(folder: Path) -> None:
    (folder / LATEST).write_text(f"iter_00000001 {'0' * 64}\n")


def _rubbish(folder: Path) -> None:
    (folder / LATEST).write_bytes(b"\x80\x04../../etc")


def _truncated(folder: Path) -> None:
    os.truncate(folder / "iter_00000003" / "model-00000.safetensors", 100)


def _renamed(folder: Path) -> None:
    (folder / "iter_00000003").rename(folder / "iter_00000004")
    _nowhere(folder)


@pytest.mark.parametrize(
    ("damage", "expected", "message"),
    [
        (_absent, 3, "latest is missing"),
        (_nowhere, 3, "iter_00000009/manifest.json is missing"),
        (_other_digest, 3, "has the digest"),
        (_rubbish, 3, "expected a checkpoint and its digest"),
        (_truncated, 2, "model-00000.safetensors has 100 bytes"),
        (_renamed, 2, "should be called iter_00000003"),
    ],
)
def test_where_latest_misleads_the_newest_complete_one_is_taken_with_a_warning(
    tmp_path: Path, damage: Callable[[Path], None], expected: int, message: str
) -> None:
    for i in (1, 2, 3):
        saved(tmp_path, i)
    damage(tmp_path)
    with pytest.warns(UserWarning, match=message):
        assert latest(tmp_path) == tmp_path / f"iter_0000000{expected}"


def test_no_checkpoint_is_none_and_only_damaged_ones_are_an_error(tmp_path: Path) -> None:
    assert latest(tmp_path / "nothing") is None
    assert latest(tmp_path) is None
    found = saved(tmp_path)
    (found.path / "optimizer-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no complete checkpoint.*optimizer-00000"):
        latest(tmp_path)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (Retention(), [1, 2, 3, 4, 5, 6]),
        (Retention(last=2), [5, 6]),
        (Retention(last=1, every=3), [3, 6]),
        (Retention(last=1, listed=frozenset({1, 4})), [1, 4, 6]),
        (Retention(last=1, protected=lambda i: i == 2), [2, 6]),
    ],
)
def test_retention_keeps_what_any_rule_keeps(
    tmp_path: Path, rules: Retention, expected: list[int]
) -> None:
    saver = Saver(tmp_path, WORLD, rules)
    shards, deleted = flat_shards(1.0), []
    for i in range(1, 7):
        saver.save(i, shards, {}, blocking=True)
        assert saver.last is not None
        deleted += saver.last.deleted
        assert latest(tmp_path) == saver.last.path
    assert iterations(tmp_path) == expected
    assert sorted(deleted) == sorted(set(range(1, 7)) - set(expected))
    assert not any(name.startswith(".") for name in names(tmp_path))


def test_a_parent_that_an_excursion_refers_to_stays_until_it_is_released(tmp_path: Path) -> None:
    saver, shards = Saver(tmp_path, WORLD, Retention(last=1)), flat_shards(1.0)
    saver.save(1, shards, {}, blocking=True)
    for by in ("runs/a", "runs/b", "runs/a"):
        refer(tmp_path, 1, by)
    saver.save(2, shards, {}, blocking=True)
    with pytest.raises(CheckpointError, match="other runs started from it"):
        Saver(tmp_path, WORLD).save(1, shards, {})
    release(tmp_path, 1, "runs/a")
    saver.save(3, shards, {}, blocking=True)
    assert iterations(tmp_path) == [1, 3]
    release(tmp_path, 1, "runs/b")
    saver.save(4, shards, {}, blocking=True)
    assert iterations(tmp_path) == [4]
    with pytest.raises(CheckpointError, match=r"iter_00000001/manifest.json is missing"):
        refer(tmp_path, 1, "runs/c")
    with pytest.raises(CheckpointError, match="holds no reference"):
        release(tmp_path, 4, "runs/c")


def test_an_old_checkpoint_that_cannot_be_deleted_is_only_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stuck(checkpoint: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(checkpoint))

    saver, shards = Saver(tmp_path, WORLD, Retention(last=1)), flat_shards(1.0)
    saver.save(1, shards, {}, blocking=True)
    monkeypatch.setattr("megarlx.checkpoint.retention.delete", stuck)
    with pytest.warns(UserWarning, match="could not be deleted: .*iter_00000001"):
        saver.save(2, shards, {}, blocking=True)
    assert latest(tmp_path) == tmp_path / "iter_00000002"


@pytest.mark.parametrize("rule", [{"last": 0}, {"every": -1}])
def test_impossible_rules_are_refused(rule: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="allowed: 1 or more"):
        Retention(**rule)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_type_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    shards = flat_shards()
    values = {
        prefix: torch.randn(shard.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
        for prefix, shard in shards.shards.items()
    }
    source = FlatShards(shards.layout, shards.layouts, 0, values)
    saver = Saver(tmp_path, WORLD)
    saver.save(1, source, {}, blocking=True)
    empty = {prefix: torch.zeros_like(value) for prefix, value in values.items()}
    target = FlatShards(shards.layout, shards.layouts, 0, empty)
    load(tmp_path / "iter_00000001", target, WORLD)
    wanted = source.tensors(counted_only=True)
    for name, tensor in target.tensors(counted_only=True).items():
        for (_, found), (_, expected) in zip(tensor.blocks, wanted[name].blocks, strict=True):
            assert torch.equal(found, expected)
