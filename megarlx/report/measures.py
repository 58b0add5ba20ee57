"""What of an early gain is kept: measures of single trunks, and ratios of means over trunks.

    m   share of samples in the form that is asked for      a   share of these that are right
    y   pass@1, m · a where no other sample is right

The trunk is the unit and arms are paired, so a value is given for every trunk, in one order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from megarlx.report.student import CONFIDENCE, interval_of_trunks, t_quantile

LEAST_DENOMINATOR = 5.0  # points: below, a ratio says nothing
REACHED = 0.9  # of late RL's gain
MATCHED = 2.0  # points of m within which two arms are alike


@dataclass(frozen=True)
class Form:
    """A gain in y, apart: more answers in the form, and more of these right."""

    form: float
    skill: float


def form_and_skill(before: tuple[float, float | None], after: tuple[float, float | None]) -> Form:
    """Of (m, a) before and after, in their unit. Their sum is the gain in y.

    An `a` that is not known, as no sample had the form, is taken to be the other's.
    """
    (m0, a0), (m1, a1) = before, after
    known = a0 if a0 is not None else a1
    a0 = a0 if a0 is not None else known
    a1 = a1 if a1 is not None else known
    if a0 is None or a1 is None:
        return Form(0.0, 0.0)
    return Form((m1 - m0) * (a0 + a1) / 2, (a1 - a0) * (m0 + m1) / 2)


@dataclass(frozen=True)
class Ratio:
    """Of two means over trunks, with Fieller's interval."""

    estimate: float
    low: float
    high: float
    trunks: int


def ratio_of_means(
    numerators: Sequence[float], denominators: Sequence[float], confidence: float = CONFIDENCE
) -> Ratio | None:
    """None where the lower bound of the denominator's own interval is below 5 points.

    The r of the interval are those for which the mean of numerator − r · denominator is not told
    apart from 0: (ȳ² − t² v_yy) r² − 2 (x̄ȳ − t² v_xy) r + (x̄² − t² v_xx) ≤ 0.
    """
    n = len(numerators)
    if n != len(denominators):
        raise ValueError(f"{n} numerators and {len(denominators)} denominators; allowed: pairs")
    if n < 2 or interval_of_trunks(denominators, confidence).low < LEAST_DENOMINATOR:
        return None
    x, y = fmean(numerators), fmean(denominators)
    t2 = t_quantile((1 + confidence) / 2, n - 1) ** 2
    v = {
        name: math.fsum((a - p) * (b - q) for a, b in zip(one, other, strict=True)) / (n - 1) / n
        for name, one, p, other, q in (
            ("xx", numerators, x, numerators, x),
            ("xy", numerators, x, denominators, y),
            ("yy", denominators, y, denominators, y),
        )
    }
    square = y * y - t2 * v["yy"]  # above 0, as the denominator's interval is
    half = x * y - t2 * v["xy"]
    root = math.sqrt(max(0.0, half * half - square * (x * x - t2 * v["xx"])))
    return Ratio(x / y, (half - root) / square, (half + root) / square, n)


@dataclass(frozen=True)
class Steps:
    """A number of steps, or what is known of it: between `low` and `high`."""

    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.low:.3g}"
        if math.isinf(self.high):
            return "not known" if math.isinf(self.low) else f"> {self.low:.3g}"
        if self.low <= 0:
            return f"≤ {self.high:.3g}"
        return f"{self.low:.3g} to {self.high:.3g}"

    def less(self, other: Steps) -> Steps:
        """This number − the other."""
        return Steps(_minus(self.low, other.high), _minus(self.high, other.low))


def _minus(one: float, other: float) -> float:
    return one - other if math.isfinite(one) or math.isfinite(other) else -math.inf


def steps_to(target: float, course: Mapping[int, float]) -> Steps:
    """The least number of steps at which `course`, its value by steps, has come to the target.

    Between two of them it is interpolated in the logarithm of steps; from 0 steps to the first
    there is no such way, and no more is known than both ends.
    """
    steps = sorted(course)
    if course[steps[0]] >= target:
        return Steps(steps[0], steps[0]) if steps[0] == 0 else Steps(0, steps[0])
    for before, after in pairwise(steps):
        if course[after] < target:
            continue
        if before == 0:
            return Steps(0, after)
        share = (target - course[before]) / (course[after] - course[before])
        found = math.exp(math.log(before) + share * math.log(after / before))
        return Steps(found, found)
    return Steps(steps[-1], math.inf)


def steps_to_gain(trunk: float, late: float, course: Mapping[int, float]) -> Steps:
    """To 90% of late RL's gain over the trunk's end."""
    return steps_to(trunk + REACHED * (late - trunk), course)


def best_course(courses: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Of runs at several rates: at every number of steps the best of them."""
    shared = set.intersection(*(set(course) for course in courses))
    return {k: max(course[k] for course in courses) for k in sorted(shared)}


def half_life(retention: Mapping[int, float]) -> Steps:
    """Steps of pre-training until half of the gain is left, interpolated in log tokens.

    `retention` by steps after RL, at each of which equally many tokens are read. Where the first
    has less than half, it is not known where on the way; where none has, it is more than the last.
    """
    return steps_to(-0.5, {steps: -share for steps, share in retention.items()})


@dataclass(frozen=True)
class Carry:
    """y of the vector of RL − y of the mark-only vector at an equal m, for each trunk."""

    by_trunk: dict[str, float]
    left_out: tuple[str, ...]  # where m differs by more than 2 points


def answer_specific_carry(
    rl: Mapping[str, tuple[float, float]], mark_only: Mapping[str, tuple[float, float]]
) -> Carry:
    """Of (m, y) in points by trunk; `mark_only` lacks a trunk where no α was found."""
    carried, left_out = {}, []
    for trunk, (m, y) in rl.items():
        other = mark_only.get(trunk)
        if other is None or abs(m - other[0]) > MATCHED:
            left_out.append(trunk)
        else:
            carried[trunk] = y - other[1]
    return Carry(carried, tuple(left_out))
