"""What the suite is made of: pieces, each run in a process of its own with a limit in seconds.

An illegal address or a hang on a GPU takes down the process that it is in. In a process of its own
it takes neither the pieces after it nor what the pieces before it measured.
"""

from __future__ import annotations

import contextlib
import importlib
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
GRACE_SECONDS = 3.0  # between asking a process to end and ending it
# Lines of a log that begin so are shown on the screen: they are what a piece found out.
NOTE, ROW = "NOTE ", "ROW "
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
    work: Path  # where it may write; the pieces of one call share it
    deadline: float  # time.monotonic() at which it is ended

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def either(self, full: Any, small: Any) -> Any:
        return small if self.small else full

    def keep(self, name: str, value: object) -> None:
        """For the pieces after this one."""
        write_json(self.work / f"{name}.json", value)

    def kept(self, name: str) -> Any:
        """None where no piece before this one kept it."""
        path = self.work / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None


@dataclass(frozen=True)
class Piece:
    name: str
    seconds: float  # expected on a card; it is not begun with less time left
    run: Callable[[Context], Result]
    needs: str = ""  # what a CPU cannot do for it; empty: a CPU runs it tiny

    @property
    def limit(self) -> float:
        """Seconds after which it is ended."""
        return max(10.0, 2 * self.seconds)


def note(text: str) -> None:
    """A line for the screen."""
    print(NOTE + text.replace("\n", " "), flush=True)


def show(row: Result) -> Result:
    """A row for the screen; returned, so that it can be kept in the same line."""
    gate = f", gate {row['needed']}: {'met' if row['met'] else 'missed'}" if "met" in row else ""
    print(
        f"{ROW}{row['name']} | {row['size']} | {row['ours']:.4g} against {row['baseline']:.4g} "
        f"{row['unit']} of {row['baseline_name']} | {row['ratio']:.3f}{gate}",
        flush=True,
    )
    return row


def gated(row: Result, at_least: float, applies: bool = True) -> Result:
    """The row with the gate it has to pass beside it."""
    if not applies:
        return row
    return {**row, "needed": at_least, "met": bool(row["ratio"] >= at_least)}


def there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def need(package: str) -> Any:
    """The module of this name."""
    top = package.split(".")[0]
    if not there(top):
        raise Absent(f"{top} is not installed")
    return importlib.import_module(package)


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def environment() -> dict[str, str]:
    """This process's own, in which megarlx is found without being installed."""
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
        output, _ = process.communicate(timeout=max(seconds - GRACE_SECONDS, 1.0))
    except subprocess.TimeoutExpired:
        over = True
        os.killpg(process.pid, signal.SIGTERM)  # a run then saves what it has
        try:
            output, _ = process.communicate(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            end_tree(process.pid)
            output, _ = process.communicate()
    print(output, flush=True)
    return None if over else process.returncode, output


def end_tree(root: int) -> None:
    """Ends a process and all that it started, in whatever sessions they are."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended by itself
            # The name, in brackets, may hold spaces; behind it come the state and the parent.
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found, i = [root], 0
    while i < len(found):
        found += children.get(found[i], [])
        i += 1
    for process in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def python(*words: str | Path) -> list[str | Path]:
    return [sys.executable, *words]


def write_json(path: Path, value: object) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(value, indent=1, default=str) + "\n")
    os.replace(beside, path)
