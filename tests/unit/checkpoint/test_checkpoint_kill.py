"""kill -9 at random moments of saving, and real full disks, in processes of their own."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from checkpoint_cases import WORLD, flat_shards

from megarlx.checkpoint import Retention, Saver, iterations, latest, load, verify

SHAPES = {"embedding.weight": (300, 1000), "norm.weight": (700,)}  # large enough to be hit


def save_for_ever(folder: Path) -> None:
    shards = flat_shards(0.0, SHAPES)
    saver = Saver(folder, WORLD, Retention(last=2))
    print("ready", flush=True)
    for i in range(1, 100_000):
        for shard in shards.shards.values():
            shard.fill_(float(i))
        saver.save(i, shards, {"cursor": i}, blocking=i % 2 == 0)


def process(call: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, call, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_save_leaves_a_checkpoint_that_loads_whole(tmp_path: Path, seed: int) -> None:
    moments = random.Random(seed)
    newest = 0
    for _ in range(3 if seed == 0 else 20):
        child = process("save_for_ever", str(tmp_path))
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.05 + 0.3 * moments.random())
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        with warnings.catch_warnings():
            # The kill may come between a checkpoint's name and `latest`.
            warnings.simplefilter("ignore")
            found = latest(tmp_path)
        assert found is not None
        for iteration in iterations(tmp_path):  # none is half there, not even the others
            assert verify(tmp_path / f"iter_{iteration:08d}").iteration == iteration
        shards = flat_shards(-1.0, SHAPES)
        loaded = load(found, shards, WORLD)
        newest = max(newest, loaded.iteration)
        assert loaded.state == {"cursor": loaded.iteration}
        for tensor in shards.tensors(counted_only=True).values():
            assert all((values == loaded.iteration).all() for _, values in tensor.blocks)
    assert newest > 1


def save_until_full(folder: Path, limit: str) -> None:
    """A file-size limit, which ends a write in the middle as a full disk does."""
    shards = flat_shards(1.0, SHAPES)
    saver = Saver(folder, WORLD)
    saver.save(1, shards, {}, blocking=True)
    if int(limit):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    for i in range(2, 100):
        saver.save(i, shards, {})
    saver.wait()


def check_full(folder: Path, call: list[str], reason: str) -> None:
    child = process(*call)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 1
    assert "CheckpointError" in errors
    assert reason in errors
    last = latest(folder)
    assert last is not None
    assert f"the last good checkpoint is {last}" in errors
    assert [verify(folder / f"iter_{i:08d}").iteration for i in iterations(folder)] == [
        *range(1, verify(last).iteration + 1)
    ]


def test_a_write_that_ends_in_the_middle_leaves_the_last_checkpoint_good(tmp_path: Path) -> None:
    check_full(tmp_path, ["save_until_full", str(tmp_path), "500000"], "File too large")


def test_a_small_full_disk_leaves_the_last_checkpoint_good(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.decode().strip()}")
    try:
        check_full(disk, ["save_until_full", str(disk), "0"], "No space left on device")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(__file__))
    functions = {f.__name__: f for f in (save_for_ever, save_until_full)}
    functions[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])  # type: ignore[operator]
