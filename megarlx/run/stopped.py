"""How a run that was told to stop asks to be started again.

Alone, under Slurm and under MPI its exit code says it: 75. torchrun hands no worker's code on, and
restarts workers that end with another one than 0: there the code is 0, and only the file
RUN/stopped.json says that the run is not done. It is written in all cases, after the checkpoint:

    torchrun … -m megarlx train CONFIG.toml --out RUN; [ -e RUN/stopped.json ] && sbatch again.sh
"""

from __future__ import annotations

import json
from pathlib import Path

from megarlx.data.token_files import write_atomically

REQUEUE = 75
NAME = "stopped.json"


def mark_stopped(run: Path, reason: str, step: int) -> None:
    """By the first rank, once the checkpoint of the step is complete."""
    write_atomically(run / NAME, json.dumps({"reason": reason, "step": step}) + "\n")


def clear_mark(run: Path) -> None:
    """By the first rank, when it goes on."""
    (run / NAME).unlink(missing_ok=True)


def exit_code(launcher: str) -> int:
    """Of a stopped run, by what started it (`comm.launch.Launch.launcher`)."""
    return 0 if launcher == "torchrun" else REQUEUE
