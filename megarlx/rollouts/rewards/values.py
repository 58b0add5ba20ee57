"""What passes as a reward, of a reward function and of an environment's step alike.

(No torch here: worker processes import this and must start fast.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from typing import Any, Literal

# Larger ones vanish or overflow in fp32 advantages: squares of a sum of weighted ones must fit.
LARGEST = 1e9

Wrong = Literal["not_finite", "too_large"]


def number(value: Any) -> float:
    """A Python, NumPy or torch number, true and false too; anything else is a TypeError."""
    if isinstance(value, str | bytes | bytearray):
        raise TypeError(f"{value[:80]!r} is text, not a number")
    try:
        return float(value)
    except OverflowError:  # an integer beyond all floats
        return math.inf if value > 0 else -math.inf


def numbers(values: Any) -> list[float | None]:
    """One for each sample, in their order: what has no order cannot be rewards."""
    if isinstance(values, str | bytes | bytearray | Mapping | Set):
        raise TypeError(f"a {type(values).__name__} is no list of rewards")
    return [None if value is None else number(value) for value in values]


def wrong(value: float) -> Wrong | None:
    if not math.isfinite(value):
        return "not_finite"
    return "too_large" if abs(value) > LARGEST else None


def described(value: float) -> str:
    return f"returned {value:g}; rewards are between -{LARGEST:g} and {LARGEST:g}"
