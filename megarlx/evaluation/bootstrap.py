"""Intervals by resampling questions: what would have come out of other questions of the same kind.

The differences of two models are taken question by question (paired): what makes a question hard
for both cancels out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
AT_ONCE = 4_000_000  # drawn places held in memory


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float
    questions: int

    @property
    def above_zero(self) -> bool:
        return self.low > 0

    @property
    def below_zero(self) -> bool:
        return self.high < 0


def bootstrap(
    strata: Sequence[Sequence[float]],
    *,
    seed: int = 0,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """The mean over all strata, each with the same weight, and its percentile interval.

    A stratum holds one number a question; its questions are drawn again with putting back, within
    the stratum. (Seeds of a study are strata: each has a world of its own.)
    """
    if not strata or any(len(values) == 0 for values in strata):
        sizes = [len(values) for values in strata]
        raise ValueError(f"bootstrap: strata of {sizes} questions; each needs at least 1")
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(
            f"bootstrap: confidence is {confidence} and resamples {resamples}; allowed are "
            "0 to 1 without the ends, and at least 1"
        )
    generator = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for values in strata:
        numbers = np.asarray(values, dtype=np.float64)
        step = max(1, AT_ONCE // len(numbers))
        for begin in range(0, resamples, step):
            count = min(step, resamples - begin)
            drawn = generator.integers(0, len(numbers), (count, len(numbers)))
            means[begin : begin + count] += numbers[drawn].mean(1) / len(strata)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    mean = float(np.mean([np.mean(values) for values in strata]))
    return Interval(mean, float(low), float(high), sum(map(len, strata)))


Values = Mapping[str, float]  # of each question, by its id


def paired_difference(
    one: Values, other: Values, *, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """`one` minus `other`, on the same questions."""
    return pooled_difference([[(one, other)]], seed=seed, confidence=confidence)


def pooled_difference(
    strata: Sequence[Sequence[tuple[Values, Values]]], *, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Over several pairs of models: a stratum holds the pairs that answered the same questions
    (the checkpoints of one seed, say). A question is drawn with its differences in all of them,
    which are no independent observations."""
    return bootstrap(
        [_mean_differences(pairs) for pairs in strata], seed=seed, confidence=confidence
    )


def _mean_differences(pairs: Sequence[tuple[Values, Values]]) -> list[float]:
    if not pairs:
        raise ValueError("bootstrap: a stratum holds no pair")
    ids = list(pairs[0][0])
    for one, other in pairs:
        for values in (one, other):
            if values.keys() != pairs[0][0].keys():
                differing = sorted(values.keys() ^ pairs[0][0].keys())
                raise ValueError(
                    f"bootstrap: the questions differ in {', '.join(differing[:5])} "
                    f"({len(differing)} in all); pairs need the same questions"
                )
    return [sum(one[i] - other[i] for one, other in pairs) / len(pairs) for i in ids]
