"""A stopped run can be told from one that is done, whatever launched it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megarlx.run.stopped import clear_mark, exit_code, mark_stopped


def test_the_mark_says_why_and_where_and_goes_when_the_run_goes_on(tmp_path: Path) -> None:
    clear_mark(tmp_path)  # there is none yet
    mark_stopped(tmp_path, "SIGTERM", 12)
    mark_stopped(tmp_path, "stop_after_minutes", 20)
    text = (tmp_path / "stopped.json").read_text()
    assert json.loads(text) == {"reason": "stop_after_minutes", "step": 20}
    clear_mark(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("launcher", ["none", "openmpi", "slurm"])
def test_launchers_that_hand_the_code_on_get_it(launcher: str) -> None:
    assert exit_code(launcher) == 75


def test_torchrun_neither_hands_a_code_on_nor_leaves_it_alone(tmp_path: Path) -> None:
    """Why it gets 0: with 75 it starts the workers again, and says 1 itself."""
    program = tmp_path / "program.py"
    program.write_text("print('started', flush=True)\nraise SystemExit(75)\n")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    words += ["--max-restarts=1", "--monitor-interval=0.1", str(program)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("started")) == (1, 2)
    assert exit_code("torchrun") == 0
