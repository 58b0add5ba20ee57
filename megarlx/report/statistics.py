"""Intervals of means over questions, by resampling the questions.

The same questions are asked in several cells (checkpoints, seeds). A question is drawn together
with all its cells, so that questions which are hard everywhere widen the interval as they should.
A paired comparison is the interval of the per-question differences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 0  # of the resampling: the same files give the same report

Values = Mapping[str, float]  # question -> its value in one cell


@dataclass(frozen=True)
class Interval:
    estimate: float
    low: float
    high: float
    questions: int


def differences(after: Values, before: Values) -> dict[str, float]:
    """Of the questions that both hold."""
    return {
        question: after[question] - before[question] for question in after if question in before
    }


def interval_of_mean(cells: Sequence[Values]) -> Interval | None:
    """Of the mean over the questions of all cells; None where there are none."""
    return interval_of_suites([cells])


def interval_of_suites(suites: Sequence[Sequence[Values]]) -> Interval | None:
    """Of the mean of the suites' means, each over the questions of all its cells.

    Every suite weighs the same however many questions it has; suites without any are left out.
    """
    sums = [_by_question(cells) for cells in suites if any(cells)]
    if not sums:
        return None
    estimate = math.fsum(float(total.sum() / count.sum()) for total, count in sums) / len(sums)
    questions = sum(len(total) for total, _ in sums)
    if min(len(total) for total, _ in sums) < 2:
        return Interval(estimate, -math.inf, math.inf, questions)
    draws = np.zeros(RESAMPLES)
    for at, (total, count) in enumerate(sums):
        drawn = _draws(len(total), at)
        draws += total[drawn].sum(axis=1) / count[drawn].sum(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws / len(sums), [tail, 1 - tail])
    return Interval(estimate, float(low), float(high), questions)


def _by_question(cells: Sequence[Values]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each question: the sum of its values and in how many cells it was asked."""
    place: dict[str, int] = {}
    for cell in cells:
        for question in cell:
            place.setdefault(question, len(place))
    total, count = np.zeros(len(place)), np.zeros(len(place))
    for cell in cells:
        at = np.fromiter((place[question] for question in cell), dtype=np.intp, count=len(cell))
        np.add.at(total, at, np.fromiter(cell.values(), dtype=np.float64, count=len(cell)))
        np.add.at(count, at, 1.0)
    return total, count


@lru_cache(maxsize=16)
def _draws(questions: int, stream: int) -> NDArray[np.intp]:
    generator = np.random.default_rng((SEED, stream))
    return generator.integers(questions, size=(RESAMPLES, questions), dtype=np.intp)
