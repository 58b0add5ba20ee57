"""Intervals by resampling questions: what would have come out of other questions of the same kind.

The same questions are asked in several cells (checkpoints, seeds). A question is drawn together
with all its cells, so that questions which are hard everywhere widen the interval as they should.
The differences of two models are taken question by question (paired): what makes a question hard
for both cancels out.
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
SEED = 0  # of the resampling: the same results give the same interval

Values = Mapping[str, float]  # question -> its value in one cell


@dataclass(frozen=True)
class Interval:
    estimate: float
    low: float
    high: float
    questions: int

    @property
    def above_zero(self) -> bool:
        return self.low > 0

    @property
    def below_zero(self) -> bool:
        return self.high < 0


def differences(after: Values, before: Values) -> dict[str, float]:
    """Of the questions that both hold."""
    return {
        question: after[question] - before[question] for question in after if question in before
    }


def paired_difference(one: Values, other: Values) -> Interval:
    """`one` minus `other`, which were asked the same questions."""
    if one.keys() != other.keys() or not one:
        differing = sorted(one.keys() ^ other.keys())
        raise ValueError(
            f"bootstrap: {len(one)} and {len(other)} questions, different in "
            f"{', '.join(differing[:5]) or 'none'}; pairs need the same questions, and some"
        )
    found = interval_of_mean([differences(one, other)])
    assert found is not None  # there are some
    return found


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
    means = np.zeros(RESAMPLES)
    for at, (total, count) in enumerate(sums):
        drawn = _draws(len(total), at)
        means += total[drawn].sum(axis=1) / count[drawn].sum(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means / len(sums), [tail, 1 - tail])
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
