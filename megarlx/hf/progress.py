"""What rank 0 shows of a conversion: bytes written by all ranks, and their rate."""

from __future__ import annotations

import sys
import time
from types import TracebackType


class ByteProgress:
    """A bar on a terminal; a line now and then where the output is a file."""

    SECONDS_BETWEEN_LINES = 30.0

    def __init__(self, what: str, total: int, show: bool) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        terminal = sys.stderr.isatty()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            disable=not (show and terminal),
        )
        self._lines = show and not terminal
        self._what, self._total = what, max(1, total)
        self._task = self._bar.add_task(what, total=self._total)
        self._line = time.monotonic()

    def update(self, done: int) -> None:
        self._bar.update(self._task, completed=done)
        now = time.monotonic()
        if self._lines and now - self._line > self.SECONDS_BETWEEN_LINES:
            self._line = now
            percent = 100 * done / self._total
            print(f"{self._what} {percent:.1f}% of {self._total / 1e6:,.0f} MB", file=sys.stderr)

    def __enter__(self) -> ByteProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
