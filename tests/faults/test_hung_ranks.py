"""A rank that hangs is named by those that waited for it."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from fault_runs import children, command, started, until_step, with_signal
from training_runs import write_config

from megarlx.run.rank_logs import log_path

TIME_LIMIT = 6  # seconds
SLACK = 30  # for torchrun to notice, and for a busy machine


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hung")
    return write_config(folder, folder / "world")


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_the_rank_that_all_wait_for_is_named_within_the_time_limit(
    tmp_path: Path, config: Path, rank: int
) -> None:
    settings = ("layout.data=2", "training.steps=100000", f"layout.time_limit_seconds={TIME_LIMIT}")
    with started(command(config, tmp_path, *settings, processes=2)) as torchrun:
        until_step(torchrun, 3)
        ranks = children(torchrun.pid)
        assert len(ranks) == 2
        with_signal(ranks[rank], signal.SIGSTOP)
        since = time.monotonic()
        other = log_path(tmp_path, 1 - rank)
        said = f"of 2 ranks, {rank} did not say within 5 s that they failed"
        while said not in (text := other.read_text()):
            assert time.monotonic() - since < TIME_LIMIT + SLACK, text
            time.sleep(0.1)
