"""Runs that are killed or told to stop at any moment come back to the undisturbed result."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "end_to_end"))
from training_runs import command, environment, run, tensors, train, write_config

STEPS = 40
OVERRIDES = (f"training.steps={STEPS}", "checkpoints.save_every_steps=3", "checkpoints.keep_last=2")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("faults")
    config = write_config(folder, folder / "world")
    assert train(config, folder / "undisturbed", *OVERRIDES) == 0
    return config, folder / "undisturbed"


def killed_until_done(config: Path, out: Path, kills: int, seed: int, processes: int = 1) -> int:
    """Starts the run again and again, killing it `kills` times; returns how often it was killed."""
    draw, killed = random.Random(seed), 0
    words = command(config, out, *OVERRIDES, processes=processes)
    for _ in range(kills):
        process = subprocess.Popen(
            words,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        for line in process.stdout:  # it trains once it prints; then some time more
            if line.startswith("step "):
                break
        time.sleep(draw.uniform(0.0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.stdout.close()
    done = run(words)
    assert done.returncode == 0, done.stdout + done.stderr
    return killed


def test_a_run_killed_at_random_moments_ends_with_the_undisturbed_weights(
    tmp_path: Path, undisturbed: tuple[Path, Path]
) -> None:
    config, whole = undisturbed
    assert killed_until_done(config, tmp_path, kills=4, seed=0) >= 1
    assert tensors(tmp_path, STEPS) == tensors(whole, STEPS)


@pytest.mark.slow
def test_a_run_killed_forty_times_ends_with_the_undisturbed_weights(
    tmp_path: Path, undisturbed: tuple[Path, Path]
) -> None:
    config, whole = undisturbed
    for seed in range(8):
        out = tmp_path / str(seed)
        assert killed_until_done(config, out, kills=5, seed=seed + 1) >= 1
        assert tensors(out, STEPS) == tensors(whole, STEPS)


@pytest.mark.slow
def test_a_run_of_four_processes_killed_at_random_moments_recovers(
    tmp_path: Path, undisturbed: tuple[Path, Path]
) -> None:
    config, _ = undisturbed
    killed_until_done(config, tmp_path / "four", kills=3, seed=3, processes=4)
    whole = run(command(config, tmp_path / "whole", *OVERRIDES, processes=4))
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert tensors(tmp_path / "four", STEPS) == tensors(tmp_path / "whole", STEPS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_finishes_the_step_saves_and_asks_to_be_started_again(
    tmp_path: Path, undisturbed: tuple[Path, Path], number: signal.Signals
) -> None:
    config, whole = undisturbed
    words = command(config, tmp_path, *OVERRIDES[:1])
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.send_signal(number)
    output = process.stdout.read()
    assert process.wait(60) == 75, output
    assert f"stopped by {number.name}; saved" in output
    assert run(words).returncode == 0
    assert tensors(tmp_path, STEPS) == tensors(whole, STEPS)


def test_the_clock_stops_a_run_as_a_signal_does(
    tmp_path: Path, undisturbed: tuple[Path, Path]
) -> None:
    config, _ = undisturbed
    done = run(command(config, tmp_path, *OVERRIDES, "logging.stop_after_minutes=1e-9"))
    assert done.returncode == 75
    assert "stopped by stop_after_minutes; saved" in done.stdout
