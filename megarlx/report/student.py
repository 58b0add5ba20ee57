"""Intervals over trunks: what would have come out of other seeds of the same kind.

A trunk is pre-trained once and everything is done to it, so trunks are the independent units: with
n of them the mean is within t(n − 1) standard errors, whatever the number of questions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class TrunkInterval:
    """Two-sided, of the mean over trunks; without bounds where there is but one."""

    estimate: float
    low: float
    high: float
    trunks: int


def interval_of_trunks(values: Sequence[float], confidence: float = CONFIDENCE) -> TrunkInterval:
    """`values`: one a trunk, at least one."""
    mean, count = fmean(values), len(values)
    if count < 2:
        return TrunkInterval(mean, -math.inf, math.inf, count)
    half = t_quantile((1 + confidence) / 2, count - 1) * stdev(values) / math.sqrt(count)
    return TrunkInterval(mean, mean - half, mean + half, count)


@lru_cache(maxsize=256)
def t_quantile(probability: float, degrees: int) -> float:
    """Of Student's t with so many degrees of freedom, by halving."""
    if not 0 < probability < 1 or degrees < 1:
        raise ValueError(
            f"t_quantile: probability is {probability} and degrees {degrees}; allowed are between "
            "0 and 1, and at least 1"
        )
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while within(high, degrees) < 2 * probability - 1:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if within(middle, degrees) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def within(t: float, degrees: int) -> float:
    """The chance that Student's t lies between -t and t.

    Of whole degrees of freedom it is a finite sum over powers of the cosine of an angle, whose
    tangent is t over the root of the degrees.
    """
    angle = math.atan2(t, math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total, power = 0.0, 1 + odd  # the next factor is power / (power + 1)
    for _ in range((degrees - odd) // 2):
        total += term
        term *= cosine * cosine * power / (power + 1)
        power += 2
    return (angle + sine * total) * 2 / math.pi if odd else sine * total
