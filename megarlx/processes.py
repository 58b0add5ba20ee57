"""How processes of this package end: with who started them, whatever ended that one.

Nothing of megarlx and nothing heavy is imported here: a process asks for its end before it does
anything else.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SET_PARENT_DEATH_SIGNAL = 1  # of prctl
# What takes over the processes whose parent has ended, besides process 1.
REAPERS = {
    "systemd", "init", "tini", "dumb-init", "docker-init", "catatonit", "conmon",
    "containerd-shim", "slurmstepd",
}  # fmt: skip


def die_with_parent(parent: int | None = None) -> None:
    """The kernel kills this process when the thread that started it ends.

    `parent` is who started it, where that is known: it may have ended before it was asked for.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid() if parent is None else parent
    ctypes.CDLL(None, use_errno=True).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def die_with_launcher() -> None:
    """torchrun's workers outlive a torchrun that is killed (kill -9, no memory left), and would
    train on beside those of the job's next start, in the same folder."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    if is_reaper(os.getppid()):
        os._exit(128 + signal.SIGKILL)
    die_with_parent()


def is_reaper(process: int) -> bool:
    """Whether a process started nothing itself. Process 1 of a container may be torchrun."""
    folder = Path("/proc", str(process))
    try:
        name = (folder / "comm").read_text().strip()
        program = (folder / "cmdline").read_bytes().split(b"\0")[0]
    except OSError:  # no such process, or no such folder on this system
        return False
    return name in REAPERS or (process == 1 and b"python" not in program)


def start(command: Sequence[str], **settings: Any) -> subprocess.Popen[Any]:
    """A process in a group of its own: deaf to Ctrl-C, killed with all that it started."""
    return subprocess.Popen(command, start_new_session=True, **settings)


def signal_group(process: subprocess.Popen[Any], number: signal.Signals = signal.SIGKILL) -> None:
    """Does nothing where its exit status was read: its number may be another process's by now."""
    if process.returncode is None:
        os.killpg(process.pid, number)
