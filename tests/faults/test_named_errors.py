"""What the system refuses is told with the file that it is about."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from itertools import count, islice
from pathlib import Path

import pytest

from megarlx.config.reward import RewardConfig
from megarlx.data.token_files import write_atomically
from megarlx.rollouts.rewards.process import RewardError, RewardPool
from megarlx.rollouts.rewards.sample import Sample
from megarlx.run.rank_logs import rank_log
from megarlx.training.metrics import MetricsWriter, read_metrics

FULL = Path("/dev/full")


def into_full(path: Path) -> None:
    """What this process has opened there goes to a disk without room."""
    for file in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # the one that listed them
            if os.readlink(f"/proc/self/fd/{file}") == str(path):
                full = os.open(FULL, os.O_WRONLY)
                os.dup2(full, file)
                os.close(full)


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
def test_a_full_disk_names_the_metrics_and_the_log(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    into_full(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics.jsonl'"):
        writer.scalars(1, {"loss": 1.0})
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_00000.log").symlink_to(FULL)
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*rank_00000.log'"),
        rank_log(tmp_path, 0),
    ):
        raise AssertionError("the first line is written before")


@pytest.fixture
def few_files() -> Iterator[None]:
    """The limit is of the largest number of a file, not of how many there are: two are left."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = set(map(int, os.listdir("/proc/self/fd")))
    free = (number for number in count() if number not in used)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next(islice(free, 2, None)), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_reward_that_cannot_be_started_for_want_of_files_is_named(few_files: None) -> None:
    pool = RewardPool(RewardConfig(function="final_number"))
    with pytest.raises(RewardError, match=r"reward final_number: could not start: .*\[Errno 24\]"):
        pool.score([Sample("", "1", "1")])
    pool.close()


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "resolved.json").mkdir()
    with pytest.raises(OSError, match=r"resolved.json"):
        write_atomically(tmp_path / "resolved.json", "{}")


def test_metrics_that_are_removed_in_a_run_are_told_of_and_later_lines_kept(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.scalars(1, {"loss": 1.0})
        (tmp_path / "metrics.jsonl").unlink()
        with pytest.warns(UserWarning, match="metrics.jsonl was removed; what it held is lost"):
            writer.scalars(2, {"loss": 2.0})
        writer.scalars(3, {"loss": 3.0})
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [2, 3]
