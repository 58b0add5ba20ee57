"""kill -9 at random moments of saving, and real full disks, in processes of their own."""

from __future__ import annotations

import multiprocessing
import random
import resource
import signal
import subprocess
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from checkpoint_cases import WORLD, flat_shards

from megarlx.checkpoint import CheckpointError, Retention, Saver, iterations, latest, load, verify

SHAPES = {"embedding.weight": (300, 1000), "norm.weight": (700,)}  # large enough to be hit


def save_for_ever(folder: Path, first: int, connection: Connection) -> None:
    shards = flat_shards(0.0, SHAPES)
    saver = Saver(folder, WORLD, Retention(last=2))
    for i in range(first, 100_000):
        for shard in shards.shards.values():
            shard.fill_(float(i))
        saver.save(i, shards, {"cursor": i}, blocking=i % 2 == 0 or i == first)
        connection.send("has saved" if i == first else "saves")


def process(function: Callable[..., None], *arguments: Any) -> tuple[Any, Connection]:
    """Forked from a server that has imported what takes long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "megarlx.training.trainer"])
    ours, theirs = context.Pipe()
    child = context.Process(target=function, args=(*arguments, theirs), daemon=True)
    child.start()
    theirs.close()
    return child, ours


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_save_leaves_a_checkpoint_that_loads_whole(tmp_path: Path, seed: int) -> None:
    moments = random.Random(seed)
    newest = 0
    for _ in range(6 if seed == 0 else 40):
        child, connection = process(save_for_ever, tmp_path, newest + 1)
        assert connection.recv() == "has saved"
        time.sleep(0.2 * moments.random())
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        with warnings.catch_warnings():
            # The kill may come between a checkpoint's name and `latest`.
            warnings.simplefilter("ignore")
            found = latest(tmp_path)
        assert found is not None
        for iteration in iterations(tmp_path):  # none is half there, not even the others
            assert verify(tmp_path / f"iter_{iteration:08d}").iteration == iteration
        shards = flat_shards(-1.0, SHAPES)
        loaded = load(found, shards, WORLD)
        assert loaded.iteration > newest
        newest = loaded.iteration
        assert loaded.state == {"cursor": loaded.iteration}
        for tensor in shards.tensors(counted_only=True).values():
            assert all((values == loaded.iteration).all() for _, values in tensor.blocks)


def save_until_full(folder: Path, file_size_limit: int | None, connection: Connection) -> None:
    shards = flat_shards(1.0, SHAPES)
    saver = Saver(folder, WORLD)
    saver.save(1, shards, {}, blocking=True)
    if file_size_limit is not None:
        # Ends a write in the middle, as a full disk does.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, resource.RLIM_INFINITY))
    try:
        for i in range(2, 100):
            saver.save(i, shards, {})
        saver.wait()
    except CheckpointError as error:
        connection.send(str(error))


def check_full(folder: Path, file_size_limit: int | None, reason: str) -> None:
    child, connection = process(save_until_full, folder, file_size_limit)
    assert connection.poll(60)
    error = connection.recv()
    child.join()
    assert reason in error
    last = latest(folder)
    assert last is not None
    assert f"the last good checkpoint is {last}" in error
    assert [verify(folder / f"iter_{i:08d}").iteration for i in iterations(folder)] == [
        *range(1, verify(last).iteration + 1)
    ]


def test_a_write_that_ends_in_the_middle_leaves_the_last_checkpoint_good(tmp_path: Path) -> None:
    check_full(tmp_path, 500_000, "File too large")


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
        check_full(disk, None, "No space left on device")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
