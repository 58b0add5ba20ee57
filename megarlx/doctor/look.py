"""Looks at modules and programs from outside, each in a process of its own with a time limit."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megarlx import processes

CHILD = Path(__file__).with_name("child.py")


@dataclass(frozen=True)
class Look:
    """What became of importing a module: facts about it, or why there are none."""

    module: str
    outcome: Literal["ok", "absent", "failed", "hung"]
    facts: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    missing_module: str | None = None  # another module that this one could not find

    @property
    def ok(self) -> bool:
        return self.outcome == "ok"


def look_at(module: str, time_limit_seconds: float) -> Look:
    """Imports a module in a child that sees the same packages as this process."""
    return _asked(module, time_limit_seconds, "its import", os.environ)


def try_out(
    trial: str, time_limit_seconds: float, environment: Mapping[str, str] | None = None
) -> Look:
    """Runs one of the child's trials on the GPU."""
    given = os.environ if environment is None else environment
    return _asked(trial, time_limit_seconds, "it", given)


def _asked(
    module: str, time_limit_seconds: float, what: str, environment: Mapping[str, str]
) -> Look:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    ended = run(
        [sys.executable, "-P", str(CHILD), module],
        time_limit_seconds,
        env={**environment, "PYTHONPATH": path},
    )
    if ended.hung:
        return Look(
            module, "hung", error=f"{what} did not end within {time_limit_seconds:g} seconds"
        )
    try:
        answer = json.loads(ended.out)
    except ValueError:
        return Look(module, "failed", error=_how_it_died(ended, what))
    if "facts" in answer:
        return Look(module, "ok", answer["facts"])
    missing = answer["missing_module"]
    if missing is not None and (module == missing or module.startswith(missing + ".")):
        return Look(module, "absent")
    return Look(module, "failed", error=answer["error"], missing_module=missing)


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    status: int
    out: str
    err: str
    hung: bool


def run(
    command: Sequence[str], time_limit_seconds: float, env: Mapping[str, str] | None = None
) -> Ended:
    """Runs a program; at the time limit it is killed with all that it started."""
    try:
        process = processes.start(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=env,
        )
    except OSError as error:
        return Ended(127, "", str(error), hung=False)
    try:
        out, err = process.communicate(timeout=time_limit_seconds)
        hung = False
    except subprocess.TimeoutExpired:
        processes.signal_group(process)
        out, err = process.communicate()
        hung = True
    return Ended(process.returncode, out, err, hung)


def installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _how_it_died(ended: Ended, what: str) -> str:
    last = ended.err.strip().splitlines()[-1:] or ["it said nothing"]
    if ended.status < 0:
        return f"{what} died of {signal.Signals(-ended.status).name}: {last[0]}"
    return f"{what} ended the process with status {ended.status}: {last[0]}"
