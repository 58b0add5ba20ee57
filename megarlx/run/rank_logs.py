"""What each rank says, kept in the run's folder: RUN/logs/rank_00000.log.

    with rank_log(run, rank) as log:                    # prints and warnings are in the file too
        with Progress(console=Console(file=log.terminal)) as bar, log.beside_progress():
            ...                                         # the bar is not

Lines are stamped with UTC time and on the file at once, so that the log of a rank that was killed
ends with the last thing it said. An exception that ends the block is written with its traceback.
What C++ libraries write to the descriptor itself is on the terminal only (torchrun --log-dir).
"""

from __future__ import annotations

import errno
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from megarlx.naming import naming
from megarlx.printable import printable
from megarlx.redact import hidden
from megarlx.run.stopped import write_nowhere

GONE = (errno.EPIPE, errno.EIO)  # a pipe's reader has ended, a terminal was closed
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours and cursor movements


def log_path(run: Path, rank: int) -> Path:
    return run / "logs" / f"rank_{rank:05d}.log"


class StampedLines:
    """A file of lines, each with the time at which it began."""

    def __init__(self, path: Path, secrets: Collection[str] = ()) -> None:
        self._secrets = secrets
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        # In one write a line: nothing waits in a buffer when the process is killed.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  closed in close()
        self._unfinished = ""
        self._lock = threading.Lock()  # a background save may warn while the loop prints

    def write(self, text: str) -> None:
        with self._lock:
            *whole, self._unfinished = (self._unfinished + ESCAPES.sub("", text)).split("\n")
            if whole:
                stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                # What a carriage return wrote over was never meant to be kept.
                lines = (line.rstrip("\r").rpartition("\r")[2] for line in whole)
                lines = (printable(hidden(line, self._secrets)) for line in lines)
                text = "".join(f"{stamp} {line}\n" for line in lines)
                with naming(self._path):
                    self._file.write(text.encode())

    def write_apart(self, text: str) -> None:
        """On lines of its own, whatever the last line was."""
        self.write(f"\n{text}\n" if self._unfinished else f"{text}\n")

    def close(self) -> None:
        self._file.close()


class Tee:
    """A stream that goes on as it was, and into the log. Whatever else is asked of it, such as
    whether it is a terminal, the stream itself answers.

    A run outlives who reads it: Ctrl-C ends a `| tee` at once, and the run has yet to save.
    """

    def __init__(self, stream: TextIO, lines: StampedLines) -> None:
        self._stream, self._lines = stream, lines

    def write(self, text: str) -> int:
        self._lines.write(text)
        self._unless_gone(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._unless_gone(self._stream.flush)

    def _unless_gone(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            if error.errno not in GONE:
                raise
            write_nowhere([self._stream.fileno()])
            self._lines.write_apart(f"--- only this log is written now: {error.strerror}")

    def writelines(self, texts: Any) -> None:
        for text in texts:
            self.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@dataclass(frozen=True)
class RankLog:
    path: Path
    terminal: TextIO  # standard output without the log
    _lines: StampedLines

    @contextmanager
    def beside_progress(self) -> Iterator[None]:
        """While a rich progress bar has taken over the streams: prints pass above the bar, which
        is redrawn on `terminal` alone."""
        with _into(self._lines):
            yield


@contextmanager
def rank_log(run: Path, rank: int, secrets: Collection[str] = ()) -> Iterator[RankLog]:
    """Appends to the rank's log for the time of the block; `secrets` never stand in it."""
    path, terminal = log_path(run, rank), sys.stdout
    lines = StampedLines(path, secrets)
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    where = f"{socket.gethostname()}, process {os.getpid()}"
    lines.write(f"--- rank {rank} on {where}, restart {restart}: {' '.join(sys.argv)}\n")
    try:
        with _into(lines):
            yield RankLog(path, terminal, lines)
    except BaseException:
        lines.write_apart(traceback.format_exc().rstrip())
        raise
    else:
        lines.write_apart("--- ended")
    finally:
        lines.close()


@contextmanager
def _into(lines: StampedLines) -> Iterator[None]:
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Tee(sys.stdout, lines), Tee(sys.stderr, lines)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
