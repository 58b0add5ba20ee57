"""How a run is told to stop, and how it then asks to be started again.

Alone, under Slurm and under MPI its exit code says it: 75. torchrun hands no worker's code on, and
restarts workers that end with another one than 0: there the code is 0, and only the file
RUN/stopped.json says that the run is not done. It is written in all cases, after the checkpoint:

    torchrun … -m megarlx train CONFIG.toml --out RUN; [ -e RUN/stopped.json ] && sbatch again.sh
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from megarlx.comm.collectives import all_reduce_
from megarlx.comm.groups import Group
from megarlx.data.token_files import write_atomically

REQUEUE = 75
NAME = "stopped.json"


class StopRequest:
    """A signal or the clock asks for the end of the run, after the step that is under way."""

    def __init__(self, minutes: float | None) -> None:
        self.reason = ""
        self._until = math.inf if minutes is None else time.monotonic() + 60 * minutes

    @contextmanager
    def listening(self) -> Iterator[None]:
        def asked(number: int, _: FrameType | None) -> None:
            self.reason = signal.Signals(number).name

        before = {n: signal.signal(n, asked) for n in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agreed(self, world: Group) -> bool:
        """Whether any rank was asked: all ranks stop after the same step."""
        if not self.reason and time.monotonic() >= self._until:
            self.reason = "stop_after_minutes"
        asked = torch.tensor([int(bool(self.reason))])
        return bool(all_reduce_(asked, world, "max").item())


def mark_stopped(run: Path, reason: str, step: int) -> None:
    """By the first rank, once the checkpoint of the step is complete."""
    write_atomically(run / NAME, json.dumps({"reason": reason, "step": step}) + "\n")


def clear_mark(run: Path) -> None:
    """By the first rank, when it goes on."""
    (run / NAME).unlink(missing_ok=True)


def exit_code(launcher: str) -> int:
    """Of a stopped run, by what started it (`comm.launch.Launch.launcher`)."""
    return 0 if launcher == "torchrun" else REQUEUE
