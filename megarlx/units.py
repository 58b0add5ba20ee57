"""Numbers in a few characters, with their units."""

from __future__ import annotations


def duration(seconds: float) -> str:
    value, name = seconds / 86_400, "days"
    for limit, unit, smaller in ((100, 1, "s"), (6000, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            value, name = seconds / unit, smaller
            break
    return f"{value:.1f} {name}" if value < 10 else f"{value:.0f} {name}"


def flop(count: float) -> str:
    """Floating-point operations: 1.4 TFLOP."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.3g} {prefix}FLOP"
    return f"{count:.3g} FLOP"
