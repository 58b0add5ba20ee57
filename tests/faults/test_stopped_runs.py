"""Runs that are told to stop finish their step, save, and go on as if nothing had been."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from fault_runs import check_same, command, run, settings, started, until_step
from training_runs import train, write_config

STEPS = 30


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    return write_config(folder, folder / "world")


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    assert train(config, out, *settings(STEPS)) == 0
    return out


def told_to_stop(words: list[str], number: signal.Signals) -> tuple[int, str]:
    with started(words) as process:
        until_step(process, 2)
        process.send_signal(number)
        said, _ = process.communicate(timeout=100)
    return process.returncode, said


SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGUSR1, signal.SIGHUP)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, *SLOW])
def test_a_signal_finishes_the_step_saves_and_asks_to_be_started_again(
    tmp_path: Path, config: Path, undisturbed: Path, number: signal.Signals
) -> None:
    # No other save is due: what the second start goes on from was saved at the signal.
    overrides = (*settings(STEPS), "checkpoints.save_every_steps=1000")
    code, said = told_to_stop(command(config, tmp_path, *overrides), number)
    assert code == 75, said
    assert json.loads((tmp_path / "stopped.json").read_text())["reason"] == number.name
    assert f"stopped by {number.name}; saved" in said
    done = run(command(config, tmp_path, *overrides))
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stdout
    assert not (tmp_path / "stopped.json").exists()
    check_same(tmp_path, undisturbed, STEPS)


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_on_all_ranks(tmp_path: Path, config: Path) -> None:
    overrides = (*settings(STEPS, 4), "checkpoints.save_every_steps=1000")
    code, said = told_to_stop(command(config, tmp_path, *overrides, processes=4), signal.SIGTERM)
    assert code != 0  # torchrun has codes of its own
    assert "stopped by SIGTERM; saved" in said
    for out in (tmp_path, tmp_path / "whole"):
        done = run(command(config, out, *overrides, processes=4))
        assert done.returncode == 0, done.stderr
        assert ("going on from" in done.stdout) == (out == tmp_path)
    check_same(tmp_path, tmp_path / "whole", STEPS)


def test_the_clock_stops_a_run_as_a_signal_does(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config, tmp_path, *settings(STEPS), "logging.stop_after_minutes=1e-9") == 75
    assert "stopped by stop_after_minutes; saved" in capsys.readouterr().out
    assert (tmp_path / "checkpoints" / "iter_00000001").is_dir()
