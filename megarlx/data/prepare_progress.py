"""What rank 0 shows while token files are made: bytes done by all ranks, rates, time left."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType

from megarlx.data.documents import Piece

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_LINES = 30.0  # where the output is a file and no terminal


class Progress:
    """Counts the markers of finished pieces, whichever rank or earlier run made them."""

    def __init__(self, pieces: list[Piece], folder: Path, show: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._folder = folder
        self._open = set(range(len(pieces)))
        self._input_bytes = {n: piece.input_bytes for n, piece in enumerate(pieces)}
        self.documents = self.tokens = self.bytes = self.bad_lines = 0
        self._look(first=True)
        # Rates are of this run: what an earlier one had done took no time now.
        self._before = (self.bytes, self.tokens)
        self._start = self._looked = self._line = time.monotonic()
        self._show = show
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TextColumn("{task.fields[rates]}"),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            disable=not show or not sys.stderr.isatty(),
        )
        total = sum(self._input_bytes.values())
        self._task = self._bar.add_task("tokens", total=total, completed=self.bytes, rates="")

    def _look(self, first: bool = False) -> None:
        finished = {int(p.stem) for p in self._folder.glob("[0-9]*.json")} & self._open
        for number in finished:
            marker = json.loads((self._folder / f"{number:08d}.json").read_text())
            self.documents += marker["documents"]
            self.tokens += marker["tokens"]
            self.bad_lines += marker["bad_lines"]
            self.bytes += self._input_bytes[number]
        self._open -= finished

    def update(self) -> None:
        now = time.monotonic()
        if now - self._looked < SECONDS_BETWEEN_LOOKS:
            return
        self._looked = now
        self._look()
        self._bar.update(self._task, completed=self.bytes, rates=self.rates())
        if self._show and self._bar.disable and now - self._line > SECONDS_BETWEEN_LINES:
            self._line = now
            total = max(1, sum(self._input_bytes.values()))
            print(f"{100 * self.bytes / total:.1f}%  {self.rates()}", file=sys.stderr, flush=True)

    def rates(self) -> str:
        seconds = max(1e-9, time.monotonic() - self._start)
        megabytes = (self.bytes - self._before[0]) / seconds / 1e6
        tokens = (self.tokens - self._before[1]) / seconds
        bad = f", {self.bad_lines} bad lines" if self.bad_lines else ""
        return f"{self.tokens:,} tokens, {tokens:,.0f} tokens/s, {megabytes:.1f} MB/s{bad}"

    def wait_for_the_others(self) -> None:
        """Until every piece is there. A rank that fails ends the whole job through its launcher."""
        self._look()
        while self._open:
            time.sleep(0.05)
            self.update()
        self._bar.update(self._task, completed=self.bytes, rates=self.rates())

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
