"""Runs that are killed at any moment of training and saving come back to the undisturbed result."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from fault_runs import (
    check_same,
    children,
    command,
    kill_again_and_again,
    run,
    settings,
    started,
    until_step,
    with_signal,
)
from training_runs import train, write_config

SHORT, LONG = 30, 400  # steps


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    return write_config(folder, folder / "world")


def undisturbed(config: Path, out: Path, steps: int, processes: int) -> Path:
    words = command(config, out, *settings(steps, processes), processes=processes)
    done = run(words, seconds=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_a_run_killed_at_random_moments_ends_as_the_undisturbed_one(
    tmp_path: Path, config: Path
) -> None:
    assert train(config, tmp_path / "whole", *settings(SHORT)) == 0
    kill_again_and_again(config, tmp_path / "killed", steps=SHORT, kills=2, seed=0)
    check_same(tmp_path / "killed", tmp_path / "whole", SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 4])
def test_a_run_killed_forty_times_ends_as_the_undisturbed_one(
    tmp_path: Path, config: Path, processes: int
) -> None:
    """With four processes: torchrun and all its workers at once."""
    whole = undisturbed(config, tmp_path / "whole", LONG, processes)
    kill_again_and_again(
        config, tmp_path / "killed", steps=LONG, kills=40, seed=processes, processes=processes
    )
    check_same(tmp_path / "killed", whole, LONG)


@pytest.mark.parametrize(
    ("processes", "kills"), [(2, 1), pytest.param(4, 3, marks=pytest.mark.slow)]
)
def test_ranks_that_are_killed_come_back_by_themselves(
    tmp_path: Path, config: Path, processes: int, kills: int
) -> None:
    """kill -9 of one rank after another, under a torchrun that is left alone."""
    draw, out = random.Random(kills), tmp_path / "killed"
    overrides = settings(SHORT, processes)
    words = command(config, out, *overrides, processes=processes, restarts=kills)
    with started(words) as torchrun:
        for number in range(kills):
            until_step(torchrun, (number + 1) * SHORT // (kills + 2))
            ranks = children(torchrun.pid)[:processes]
            assert len(ranks) == processes
            with_signal(draw.choice(ranks), signal.SIGKILL)
            assert torchrun.stdout is not None
            assert any("going on from" in line for line in torchrun.stdout)
        said, _ = torchrun.communicate(timeout=120)
    assert torchrun.returncode == 0, said
    check_same(out, undisturbed(config, tmp_path / "whole", SHORT, processes), SHORT)
