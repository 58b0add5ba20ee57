"""tools/launch/: a run under a stand-in for Slurm that is stopped and comes back; a real mpirun."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fault_runs import children, run, started, until_step, with_signal
from training_runs import ROOT, losses, train, write_config

SLURM, MPIRUN_SH = (ROOT / "tools" / "launch" / name for name in ("slurm.sbatch", "mpirun.sh"))
MPIRUN = shutil.which("mpirun") or shutil.which("mpirun", path=Path(sys.executable).parent)
STEPS = 30

# One node's tasks, with what Slurm sets for them; ends like srun with the highest status.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
export SLURM_NODEID=0 SLURM_STEP_NUM_TASKS=$TASKS
export SLURM_STEP_TASKS_PER_NODE=$TASKS SLURM_STEP_NODELIST=localhost
for ((task = 0; task < TASKS; task++)); do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
  tasks+=($!)
done
highest=0
for task in "${tasks[@]}"; do
  status=0
  wait "$task" || status=$?
  ((status <= highest)) || highest=$status
done
exit $highest
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$REQUEUED"
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


class Slurm:
    """As much of Slurm as the script sees."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requeued, self.monkeypatch = folder / "requeued", monkeypatch
        for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / name).write_text(script)
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        monkeypatch.setenv("REQUEUED", str(self.requeued))
        monkeypatch.setenv("PYTHON", sys.executable)
        monkeypatch.setenv("SLURM_JOB_ID", "4321")

    def give(self, tasks: int) -> None:
        self.monkeypatch.setenv("TASKS", str(tasks))
        self.monkeypatch.setenv("MASTER_PORT", str(free_port()))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launched")
    return write_config(folder, folder / "world")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    folder = tmp_path / "slurm"
    folder.mkdir()
    return Slurm(folder, monkeypatch)


def words(config: Path, out: Path, *overrides: str) -> list[str]:
    given = ["train", str(config), "--out", str(out)]
    return [*given, *(word for override in overrides for word in ("--set", override))]


@pytest.mark.parametrize("script", [SLURM, MPIRUN_SH], ids=lambda path: path.name)
def test_the_scripts_are_valid_bash_and_can_be_executed(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.access(script, os.X_OK)


def test_a_preempted_slurm_job_saves_is_requeued_and_goes_on_with_fewer_tasks(
    tmp_path: Path, config: Path, slurm: Slurm
) -> None:
    """SIGUSR1 to the tasks, and SIGTERM to the batch script, as at a preemption."""
    out = tmp_path / "run"
    job = words(config, out, f"training.steps={STEPS}")
    slurm.give(tasks=2)
    with started(["bash", str(SLURM), *job]) as batch:
        until_step(batch, 2)
        tasks = [pid for pid in children(batch.pid) if _runs_python(pid)]
        assert len(tasks) == 2
        batch.send_signal(signal.SIGTERM)
        for task in tasks:
            with_signal(task, signal.SIGUSR1)
        said, _ = batch.communicate(timeout=100)
    assert batch.returncode == 75, said
    assert slurm.requeued.read_text() == "requeue 4321\n"
    stopped = json.loads((out / "stopped.json").read_text())
    assert 2 <= stopped["step"] < STEPS

    slurm.give(tasks=1)
    done = run(["bash", str(SLURM), *job])
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"going on from {out}/checkpoints/iter_{stopped['step']:08d}" in done.stdout
    assert slurm.requeued.read_text() == "requeue 4321\n"
    assert not (out / "stopped.json").exists()
    assert train(config, tmp_path / "whole", f"training.steps={STEPS}") == 0
    assert losses(out) == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def _runs_python(pid: int) -> bool:
    return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(sys.executable.encode() + b"\0")


def test_a_slurm_job_that_fails_keeps_its_status_and_is_not_requeued(
    tmp_path: Path, config: Path, slurm: Slurm
) -> None:
    slurm.give(tasks=2)
    done = run(["bash", str(SLURM), *words(config, tmp_path / "run", "training.stepps=3")])
    assert done.returncode == 2, done.stderr
    assert "did you mean" in done.stderr
    assert not slurm.requeued.exists()


@pytest.mark.skipif(MPIRUN is None, reason="no mpirun here")
def test_two_ranks_of_mpirun_train_what_one_process_trains(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MPIRUN is not None
    monkeypatch.setenv("PATH", f"{Path(MPIRUN).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    options = ["-n", "2", "--oversubscribe", "--allow-run-as-root"]
    job = words(config, tmp_path / "mpi", "layout.tensor=2", "training.steps=6")
    done = run([str(MPIRUN_SH), *options, "--", *job])
    assert done.returncode == 0, done.stdout + done.stderr
    assert train(config, tmp_path / "one", "training.steps=6") == 0
    assert losses(tmp_path / "mpi") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_mpirun_sh_says_how_it_is_called() -> None:
    done = run([str(MPIRUN_SH), "-n", "2"])
    assert done.returncode == 2
    assert "options of mpirun" in done.stderr
