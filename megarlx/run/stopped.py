"""How a run is told to stop, and how it then asks to be started again.

Alone, under Slurm and under MPI its exit code says it: 75. torchrun hands no worker's code on, and
restarts workers that end with another one than 0: there the code is 0, and only the file
RUN/stopped.json says that the run is not done. It is written in all cases, after the checkpoint:

    torchrun … -m megarlx train CONFIG.toml --out RUN; [ -e RUN/stopped.json ] && sbatch again.sh
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from megarlx.comm.collectives import all_reduce_
from megarlx.comm.groups import Group
from megarlx.data.token_files import write_atomically

REQUEUE = 75
NAME = "stopped.json"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it


class StopRequest:
    """A signal or the clock asks for the end of the run, after the step that is under way.

    A Ctrl-C behind the first signal ends the process at once. Other signals may come again:
    schedulers repeat theirs, and a terminal that is closed sends SIGHUP twice.
    """

    def __init__(self, minutes: float | None, *, says: bool = True) -> None:
        """`says`: whether this process tells people that it was asked."""
        self.reason = ""
        self._says = says
        self._until = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._terminals: list[int] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """To the signals that nobody has switched off, as nohup does with SIGHUP."""
        self._terminals = [number for number in (0, 1, 2) if os.isatty(number)]
        heard = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._asked) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _asked(self, number: int, _: FrameType | None) -> None:
        first, self.reason = not self.reason, self.reason or signal.Signals(number).name
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends the process in any code
        if number == signal.SIGHUP:
            write_nowhere(self._terminals)
        elif first and self._says:
            text = (
                f"\n{self.reason}: the step under way is finished, then the run is saved and ends; "
                "Ctrl-C now ends it at once, without saving\n"
            )
            # Not by print: the signal may have come in the middle of one.
            os.write(2, ((SHOW_CURSOR if 2 in self._terminals else "") + text).encode())

    def agreed(self, world: Group) -> bool:
        """Whether any rank was asked: all ranks stop after the same step."""
        if not self.reason and time.monotonic() >= self._until:
            self.reason = "stop_after_minutes"
        asked = torch.tensor([int(bool(self.reason))])
        return bool(all_reduce_(asked, world, "max").item())


def write_nowhere(files: Sequence[int]) -> None:
    """What is written to these descriptors from now on is dropped: who read it has gone."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in files:
        os.dup2(nowhere, number)
    os.close(nowhere)


def mark_stopped(run: Path, reason: str, step: int) -> None:
    """By the first rank, once the checkpoint of the step is complete."""
    write_atomically(run / NAME, json.dumps({"reason": reason, "step": step}) + "\n")


def clear_mark(run: Path) -> None:
    """By the first rank, when it goes on."""
    (run / NAME).unlink(missing_ok=True)


def done(stopped: str) -> bool:
    """For a program: what stopped a run, as whether it is done; Ctrl-C is its own."""
    if stopped == "SIGINT":
        raise KeyboardInterrupt
    return not stopped


def exit_code(launcher: str) -> int:
    """Of a stopped run, by what started it (`comm.launch.Launch.launcher`)."""
    return 0 if launcher == "torchrun" else REQUEUE
