"""Warnings, once each, of a run that learns nothing or whose numbers leave their running band.

They are made of what is logged already: nothing here waits for a device.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from statistics import median

from megarlx.config import Config
from megarlx.config.objectives import RL, RlConfig

IN_A_ROW = 3  # logs without anything to learn from
WINDOW = 20  # logs that make a band
ENOUGH = 8  # logs before there is one
DEVIATIONS = 6.0  # of the band's upper end above the median
# It is at least this share of the median above it: what is steady has hardly a deviation.
LEAST = {"loss": 0.1, "grad_norm": 1.0}


class Watch:
    def __init__(self, config: Config) -> None:
        found = config.named_objectives
        self._policies = {name for name, one in found.items() if isinstance(one, RlConfig)}
        self._stage = 0
        self._in_a_row: Counter[str] = Counter()
        self._recent: dict[str, deque[float]] = {}
        self._outside: set[str] = set()

    def __call__(self, stage: int, values: Mapping[str, float]) -> list[str]:
        """The warnings that a log's values give rise to; another stage has bands of its own."""
        if stage != self._stage:
            self._stage, self._recent, self._outside = stage, {}, set()
        names = [key.removeprefix("loss/") for key in values if key.startswith("loss/")]
        return [text for name in names for text in self._of(name, values)]

    def _of(self, name: str, values: Mapping[str, float]) -> Iterator[str]:
        yield from self._nothing_learned(name, values)
        # A policy loss is no measure: it is about 0 whatever is learned.
        kinds = ("grad_norm",) if name in self._policies else ("loss", "grad_norm")
        for kind in kinds:
            key = f"{kind}/{name}"
            if key in values:
                yield from self._left_its_band(key, values[key], LEAST[kind])

    def _nothing_learned(self, name: str, values: Mapping[str, float]) -> Iterator[str]:
        before = "rl/" if name == RL else f"rl/{name}/"
        if self._lasts(f"groups of {name}", values.get(f"{before}informative_groups") == 0):
            yield (
                f"{name} has had no informative group in the last {IN_A_ROW} logs: each prompt's "
                "samples all got the same reward, or none that is known (mean reward "
                f"{values.get(f'{before}reward', 0.0):.3f}); of the reward it learns nothing"
            )
        dull = self._in_a_row[f"groups of {name}"] > 0
        if self._lasts(name, not dull and values.get(f"grad_norm/{name}") == 0):
            yield f"grad_norm/{name} was 0 in the last {IN_A_ROW} logs; it learns nothing"

    def _lasts(self, what: str, now: bool) -> bool:
        """Whether it has been so for long enough, with this log."""
        self._in_a_row[what] = self._in_a_row[what] + 1 if now else 0
        return self._in_a_row[what] == IN_A_ROW

    def _left_its_band(self, key: str, value: float, least: float) -> Iterator[str]:
        recent = self._recent.setdefault(key, deque(maxlen=WINDOW))
        top = _top(recent, least)
        outside = not math.isfinite(value) or value > top
        if outside and key not in self._outside:
            self._outside.add(key)
            yield _text(key, value, top, recent)
        if not outside:
            self._outside.discard(key)
        if math.isfinite(value) and value != 0:  # a norm of 0 is no measure of the others
            recent.append(value)


def _top(recent: deque[float], least: float) -> float:
    """The upper end of the band: deviations are the median one, which outliers do not move."""
    if len(recent) < ENOUGH:
        return math.inf
    middle = median(recent)
    deviation = 1.4826 * median(abs(value - middle) for value in recent)
    return middle + max(DEVIATIONS * deviation, least * abs(middle))


def _text(key: str, value: float, top: float, recent: deque[float]) -> str:
    if not math.isfinite(value):
        return f"{key} is {value}"
    return (
        f"{key} is {value:.4g}, {value - top:.3g} above its band: the last {len(recent)} logs have "
        f"a median of {median(recent):.4g}, and the band ends at {top:.4g}"
    )
