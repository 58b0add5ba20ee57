"""Runs that are killed at any moment of training and saving come back to the undisturbed result."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from fault_runs import (
    FOUR,
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


@pytest.fixture(scope="module")
def undisturbed_four(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("four")
    done = run(command(config, out, *settings(SHORT), *FOUR, processes=4))
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_a_run_killed_at_random_moments_ends_as_the_undisturbed_one(
    tmp_path: Path, config: Path
) -> None:
    assert train(config, tmp_path / "whole", *settings(SHORT)) == 0
    kill_again_and_again(config, tmp_path / "killed", settings(SHORT), steps=SHORT, kills=2, seed=0)
    check_same(tmp_path / "killed", tmp_path / "whole", SHORT)


@pytest.mark.slow
def test_a_run_killed_forty_times_ends_as_the_undisturbed_one(tmp_path: Path, config: Path) -> None:
    assert train(config, tmp_path / "whole", *settings(LONG)) == 0
    kill_again_and_again(config, tmp_path / "killed", settings(LONG), steps=LONG, kills=40, seed=1)
    check_same(tmp_path / "killed", tmp_path / "whole", LONG)


@pytest.mark.slow
def test_four_processes_killed_forty_times_end_as_undisturbed_ones(
    tmp_path: Path, config: Path
) -> None:
    words = (*settings(LONG), *FOUR)
    done = run(command(config, tmp_path / "whole", *words, processes=4), seconds=600)
    assert done.returncode == 0, done.stdout + done.stderr
    kill_again_and_again(
        config, tmp_path / "killed", words, steps=LONG, kills=40, seed=2, processes=4
    )
    check_same(tmp_path / "killed", tmp_path / "whole", LONG)


def kill_ranks(config: Path, out: Path, whole: Path, kills: int, seed: int) -> None:
    """kill -9 of one rank, several times; the launcher is never told to start again."""
    draw = random.Random(seed)
    words = command(config, out, *settings(SHORT), *FOUR, processes=4, restarts=kills)
    with started(words) as process:
        for number in range(kills):
            until_step(process, (number + 1) * SHORT // (kills + 2))
            ranks = children(process.pid)
            assert len(ranks) >= 4
            with_signal(draw.choice(ranks[:4]), signal.SIGKILL)
            line = ""
            assert process.stdout is not None
            for line in process.stdout:
                if "going on from" in line:
                    break
            assert "going on from" in line
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    check_same(out, whole, SHORT)


def test_a_rank_that_is_killed_comes_back_by_itself(
    tmp_path: Path, config: Path, undisturbed_four: Path
) -> None:
    kill_ranks(config, tmp_path, undisturbed_four, kills=1, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_ranks_that_are_killed_three_times_come_back_by_themselves(
    tmp_path: Path, config: Path, undisturbed_four: Path, seed: int
) -> None:
    kill_ranks(config, tmp_path, undisturbed_four, kills=3, seed=seed)
