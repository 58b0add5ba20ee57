"""What a stage is made of: pieces that run each in a process of their own, and the time for them.

A process of its own, because an illegal address or a hang on a GPU takes down the process it is in:
the pieces after it, and what the ones before it measured, must not go with it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 10.0  # between asking a process to end and ending it
Result = dict[str, Any]


class Absent(Exception):
    """Something that a piece needs is not on this machine: written down, not a failure."""


class Failed(Exception):
    """A check did not hold; `result` is what was found."""

    def __init__(self, message: str, result: Result) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True)
class Context:
    """What a piece is told."""

    device: torch.device
    small: bool  # sizes that a CPU takes seconds for: the code is tried, nothing is measured
    work: Path  # where it may write
    deadline: float  # of time.monotonic()

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def either(self, full: Any, small: Any) -> Any:
        return small if self.small else full


@dataclass(frozen=True)
class Piece:
    name: str
    seconds: float  # it is not begun with less time left, and ended after twice as much
    run: Callable[[Context], Result]


def need(package: str) -> Any:
    """The module of this name."""
    top = package.split(".")[0]
    if importlib.util.find_spec(top) is None:
        raise Absent(f"{top} is not installed")
    return importlib.import_module(package)


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def environment() -> dict[str, str]:
    """That of this process, in which megarlx is found without being installed."""
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def call(
    command: Sequence[str | Path],
    seconds: float,
    *,
    variables: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
) -> tuple[int | None, str]:
    """(exit status, output); None where the time was over. The output also goes to stdout."""
    print("$", " ".join(map(str, command)), flush=True)
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env={**environment(), **(variables or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    over = False
    try:
        output, _ = process.communicate(timeout=max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        over = True
        output = _end(process)
    print(output, flush=True)
    return None if over else process.returncode, output


def _end(process: subprocess.Popen[str]) -> str:
    """First politely, so that a run saves what it has; then the whole session of the process."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            return process.communicate(timeout=GRACE_SECONDS)[0]
        except subprocess.TimeoutExpired:
            continue
    return ""


def python(*words: str | Path) -> list[str | Path]:
    return [sys.executable, *words]


def write_json(path: Path, value: object) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(value, indent=1, default=str) + "\n")
    os.replace(beside, path)


def gated(row: Result, at_least: float, applies: bool = True) -> Result:
    """The row with the gate it has to pass beside it."""
    if not applies:
        return row
    return {**row, "needed": at_least, "met": bool(row["ratio"] >= at_least)}
