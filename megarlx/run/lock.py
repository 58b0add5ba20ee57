"""One job at a time in a run's folder.

    with run_lock(run, mesh.world):         # on all ranks; the first one holds it
        ...

Two jobs in one folder clear away each other's unfinished checkpoints and mix their metrics. The
lock is the kernel's, so it goes with its process however that ends; the file's text only says who
has it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megarlx.comm.collectives import gather_values
from megarlx.comm.groups import Group

NAME = ".lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # some network file systems


class RunLockedError(ValueError):
    """Another process is at work in the folder."""


@contextmanager
def run_lock(run: Path, world: Group) -> Iterator[None]:
    """Raises on all ranks where the first is refused."""
    with ExitStack() as held:
        problem = ""
        if world.is_first:
            try:
                held.enter_context(_locked(run))
            except RunLockedError as error:
                problem = str(error)
        problem = gather_values(problem, world)[0]
        if problem:
            raise RunLockedError(problem)
        yield


def is_free(run: Path) -> bool:
    """Whether it is known that no process is at work in the folder."""
    path = run / NAME
    if not path.exists():
        return True
    with open(path, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, *UNSUPPORTED):
                raise
            return False
    return True


@contextmanager
def _locked(run: Path) -> Iterator[None]:
    run.mkdir(parents=True, exist_ok=True)
    path = run / NAME
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "a process that has not said its name"
            raise RunLockedError(
                f"{run} is in use by {holder}; two jobs in one folder would damage it. Wait, end "
                "that one, or choose another --out"
            ) from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            warnings.warn(f"{path}: this file system has no locks ({error.strerror})", stacklevel=5)
        file.truncate(0)
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
        file.flush()
        yield
