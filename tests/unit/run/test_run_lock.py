"""A run's folder belongs to one job at a time, for as long as that lives."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megarlx.comm.groups import Group
from megarlx.run.lock import RunLockedError, run_lock

WORLD = Group.alone("world")
ROOT = Path(__file__).resolve().parents[3]
HOLD = """
import sys, time
from pathlib import Path
from megarlx.run.lock import run_lock
from megarlx.comm.groups import Group
with run_lock(Path(sys.argv[1]), Group.alone("world")):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_in_use_is_refused_with_its_user_until_that_is_killed(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"held\n"
        refused = pytest.raises(RunLockedError, match=f"is in use by process {holder.pid} on ")
        with refused, run_lock(run, WORLD):
            pass
        with run_lock(tmp_path / "runs" / "two", WORLD):  # folders do not know each other
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with run_lock(run, WORLD):
        assert f"process {os.getpid()} on " in (run / ".lock").read_text()
    with run_lock(run, WORLD):
        assert (run / ".lock").read_text().count("\n") == 1


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="has no locks"), run_lock(tmp_path, WORLD):
        pass
