"""Where a run says what it says while it trains: lines, a progress bar, the metrics files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megarlx.printable import indented
from megarlx.run.rank_logs import RankLog
from megarlx.training.metrics import MetricsWriter

SHOWN_SAMPLES = 4


class Screen:
    """Says something on the first rank only: there alone is a writer."""

    def __init__(self, writer: MetricsWriter | None, log: RankLog, steps: int) -> None:
        """`steps`: of the whole run."""
        self.writer, self.log, self.steps = writer, log, steps
        self._bar: Progress | None = None

    @contextmanager
    def progress(self, done: int) -> Iterator[None]:
        """A bar below the lines, where the first rank writes to a terminal."""
        if self.writer is None or not self.log.terminal.isatty():
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        console = Console(file=self.log.terminal)
        with Progress(*columns, console=console) as self._bar, self.log.beside_progress():
            self._task = self._bar.add_task("training", total=self.steps, completed=done)
            yield
        self._bar = None

    def advance(self, done: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def say(
        self,
        step: int,
        text: str,
        values: Mapping[str, float] | None = None,
        trunk_tokens: int = 0,
    ) -> None:
        """A line for people, and `values` for the metrics files."""
        if self.writer is None:
            return
        if values:
            self.writer.scalars(step, values, trunk_tokens)
        print(f"step {step}/{self.steps}: {text}", flush=True)

    def warn(self, step: int, text: str) -> None:
        self.say(step, f"warning: {text}")

    def show(self, step: int, key: str, samples: Sequence[Mapping[str, Any]]) -> None:
        """A few samples as TensorBoard text; what a model wrote is shown, not rendered."""
        if self.writer is None or not samples:
            return
        parts = [
            f"{'prompt':<14}{sample['prompt']}\n{'completion':<14}{sample['completion']}\n"
            f"{'reference':<14}{sample['reference']}\n{'reward':<14}{sample['reward']} "
            f"({sample['finish_reason']})\n"
            for sample in samples[:SHOWN_SAMPLES]
        ]
        self.writer.text(step, key, indented("\n".join(parts)))
