"""Answers shown as they grow: one after its prompt, or several side by side on a terminal.

What a model wrote is never trusted: it is shown with its control characters written out.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megarlx.generation.text import TextPiece
from megarlx.printable import complain, printable

NARROWEST = 24  # characters of a column; narrower ones stand below one another
AGAIN_A_SECOND = 12  # a screen of columns is drawn


class Interrupt:
    """The first Ctrl-C asks for the end of an answer, the second ends the program; `at_once`, the
    first does."""

    def __init__(self, *, at_once: bool = False) -> None:
        self.asked, self.at_once = False, at_once

    @contextmanager
    def listening(self) -> Iterator[None]:
        before = signal.signal(signal.SIGINT, self._hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.count()

    def count(self) -> None:
        if self.asked or self.at_once:
            raise KeyboardInterrupt
        self.asked = True


def show(pieces: Iterator[tuple[int, TextPiece]], samples: int, interrupt: Interrupt) -> None:
    """Until all are ended, or the interrupt asks for it."""
    ended: dict[int, str] = {}

    def heard() -> Iterator[tuple[int, str]]:
        with interrupt.listening():
            for place, piece in pieces:
                yield place, printable(piece.text)
                if piece.finish_reason is not None:
                    ended[place] = piece.finish_reason
                if interrupt.asked and len(ended) < samples:
                    break

    if samples == 1:
        _one(heard())
    elif sys.stdout.isatty():
        _side_by_side(heard(), samples, Console())
    else:
        _one_below_the_other(heard(), samples)
    _say_how_they_ended(ended, samples)


def _one(texts: Iterator[tuple[int, str]]) -> None:
    for _, text in texts:
        print(text, end="", flush=True)
    print(flush=True)


def _one_below_the_other(texts: Iterator[tuple[int, str]], samples: int) -> None:
    whole = [""] * samples
    for place, text in texts:
        whole[place] += text
    for number, text in enumerate(whole, 1):
        print(f"[{number}] {text}", flush=True)


def _side_by_side(texts: Iterator[tuple[int, str]], samples: int, console: Console) -> None:
    whole = [""] * samples
    with Live(
        _columns(whole, console.width), console=console, refresh_per_second=AGAIN_A_SECOND
    ) as live:
        for place, text in texts:
            whole[place] += text
            live.update(_columns(whole, console.width))
        live.vertical_overflow = "visible"  # while they grow, what fits on the screen


def _columns(texts: list[str], width: int) -> Table:
    per_row = max(1, min(len(texts), width // NARROWEST))
    table = Table.grid(expand=True, padding=(0, 2, 0, 0))
    for _ in range(per_row):
        table.add_column(ratio=1, overflow="fold")
    for first in range(0, len(texts), per_row):
        row = list(enumerate(texts, 1))[first : first + per_row]
        table.add_row(*(Text(f"[{number}]", style="dim") for number, _ in row))
        table.add_row(*(Text(text) for _, text in row))
    return table


def _say_how_they_ended(ended: dict[int, str], samples: int) -> None:
    """Only where it was not the model that ended them."""
    for place in range(samples):
        which = f"[{place + 1}] " if samples > 1 else ""
        if ended.get(place) == "length":
            complain(f"{which}(cut off: --max-new-tokens, or the model's longest sequence)")
        elif place not in ended:
            complain(f"{which}(stopped)")
