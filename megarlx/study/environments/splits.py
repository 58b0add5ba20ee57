"""Tasks that belong to one split and to no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from megarlx.data.draw import Draw, Split
from megarlx.data.order import key_of

T = TypeVar("T")
TRIES, TEST_PERCENT, VALIDATION_PERCENT = 10_000, 15, 10


def drawn_of_split(
    draw: Draw, split: Split, make: Callable[[Draw], T | None], text: Callable[[T], str]
) -> T:
    """Draws until something is made that belongs to the split. Which one it belongs to is a
    function of its text, so no task of one split is one of another."""
    for _ in range(TRIES):
        thing = make(draw)
        if thing is not None and _split_of(text(thing)) == split:
            return thing
    raise ValueError(f"environment: no task of split '{split}' in {TRIES} draws: there are too few")


def _split_of(text: str) -> Split:
    bucket = key_of("environment", "split", text) % 100
    if bucket < TEST_PERCENT:
        return "test"
    return "validation" if bucket < TEST_PERCENT + VALIDATION_PERCENT else "train"
