"""Measures of what is kept, on made numbers."""

from __future__ import annotations

import math
import random
from statistics import fmean, variance

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarlx.report.measures import (
    Steps,
    answer_specific_carry,
    best_course,
    form_and_skill,
    half_life,
    ratio_of_means,
    steps_to_gain,
)
from megarlx.report.student import t_quantile

SHARE = st.floats(0.0, 1.0)


@given(SHARE, SHARE, SHARE, SHARE)
def test_form_and_skill_sum_to_the_gain(m0: float, a0: float, m1: float, a1: float) -> None:
    found = form_and_skill((m0, a0), (m1, a1))
    assert abs(found.form + found.skill - (m1 * a1 - m0 * a0)) < 1e-12
    assert form_and_skill((m0, a0), (m1, a0)).skill == 0
    assert form_and_skill((m0, a0), (m0, a1)).form == 0


@given(SHARE, SHARE)
def test_where_nothing_had_the_form_the_gain_is_form(m: float, a: float) -> None:
    found = form_and_skill((0.0, None), (m, a))
    assert abs(found.form - m * a) < 1e-12
    assert found.skill == 0
    assert form_and_skill((0.0, None), (0.0, None)).form == 0


def pairs(n: int, seed: int, mean: tuple[float, float], spread: float) -> list[tuple[float, float]]:
    draw = random.Random(seed)
    rows = []
    for _ in range(n):
        common = draw.gauss(0, spread)
        rows.append((mean[0] + common + draw.gauss(0, spread), mean[1] + common))
    return rows


@pytest.mark.parametrize("seed", range(8))
def test_fiellers_interval_is_its_closed_form(seed: int) -> None:
    rows = pairs(10, seed, (20.0, 50.0), 5.0)
    x, y = [list(column) for column in zip(*rows, strict=True)]
    found = ratio_of_means(x, y)
    assert found is not None
    n, t = len(x), t_quantile(0.975, len(x) - 1)
    covariance = sum((a - fmean(x)) * (b - fmean(y)) for a, b in rows) / (n - 1)
    v11, v22, v12 = variance(x) / n, variance(y) / n, covariance / n
    ratio, g = fmean(x) / fmean(y), t * t * v22 / fmean(y) ** 2
    middle = ratio - g * v12 / v22
    half = (
        t / fmean(y) * math.sqrt(v11 - 2 * ratio * v12 + ratio**2 * v22 - g * (v11 - v12**2 / v22))
    )
    assert found.estimate == pytest.approx(ratio, rel=1e-12)
    assert found.low == pytest.approx((middle - half) / (1 - g), rel=1e-9)
    assert found.high == pytest.approx((middle + half) / (1 - g), rel=1e-9)
    assert found.low < ratio < found.high


def test_fiellers_interval_covers_the_ratio_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(2000):
        rows = pairs(10, 1000 + seed, (20.0, 40.0), 6.0)
        found = ratio_of_means(*(list(column) for column in zip(*rows, strict=True)))
        assert found is not None
        covered += found.low <= 0.5 <= found.high
    assert abs(covered / 2000 - 0.95) < 0.015


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=12))
def test_a_small_denominator_gives_no_ratio(values: list[float]) -> None:
    n, t = len(values), t_quantile(0.975, len(values) - 1)
    low = fmean(values) - t * math.sqrt(variance(values) / n)
    found = ratio_of_means([1.0] * n, values)
    assert (found is None) == (low < 5.0) or math.isclose(low, 5.0)
    assert ratio_of_means([3.0], [50.0]) is None  # one trunk has no interval


@pytest.mark.parametrize(
    ("course", "expected", "said"),
    [
        ({0: 95.0, 10: 96.0}, (0, 0), "0"),
        ({0: 50.0, 10: 91.0, 20: 92.0}, (0, 10), "≤ 10"),
        ({0: 50.0, 10: 90.0, 20: 92.0}, (0, 10), "≤ 10"),
        ({0: 10.0, 10: 20.0, 20: 30.0, 40: 60.0, 80: 89.0}, (80, math.inf), "> 80"),
        ({10: 20.0, 20: 100.0}, None, ""),
        ({10: 95.0, 20: 100.0}, (0, 10), "≤ 10"),
        ({0: 0.0, 10: 80.0, 20: 70.0, 40: 100.0}, None, ""),
    ],
)
def test_steps_to_90_percent_are_censored_where_no_more_is_known(
    course: dict[int, float], expected: tuple[float, float] | None, said: str
) -> None:
    found = steps_to_gain(0.0, 100.0, course)
    if expected is not None:
        assert (found.low, found.high) == expected
        assert str(found) == said
        return
    assert found.low == found.high
    low, high = max(k for k in course if k < found.low), min(k for k in course if k > found.low)
    share = math.log(found.low / low) / math.log(high / low)
    assert course[low] + share * (course[high] - course[low]) == pytest.approx(90.0)


def test_steps_saved_keep_what_is_known_of_both() -> None:
    late, exact = Steps(25.0, 25.0), Steps(12.5, 12.5)
    assert str(late.less(exact)) == "12.5"
    assert str(late.less(Steps(0, 0))) == "25"
    assert str(late.less(Steps(0, 10))) == "15 to 25"
    assert str(Steps(80, math.inf).less(exact)) == "> 67.5"
    assert str(Steps(80, math.inf).less(Steps(80, math.inf))) == "not known"
    assert best_course([{10: 1.0, 20: 5.0}, {10: 2.0, 20: 4.0, 40: 9.0}]) == {10: 2.0, 20: 5.0}


@given(st.floats(1.0, 7.0))
def test_a_half_life_is_where_retention_that_falls_with_log_tokens_crosses_one_half(
    at: float,
) -> None:
    steps = (5, 10, 20, 40, 80, 160)
    course = {k: 0.5 - 0.3 * (math.log2(k) - at) for k in steps}
    found = half_life(course)
    if 2**at <= 5:
        assert (found.low, found.high) == (0, 5)
    elif 2**at <= 160:
        assert found.low == pytest.approx(2**at)
        assert found.low == found.high
    assert str(half_life(dict.fromkeys(steps, 0.7))) == "> 160"


def test_carry_leaves_out_and_counts_trunks_whose_marks_differ() -> None:
    rl = {"a": (90.0, 60.0), "b": (80.0, 50.0), "c": (70.0, 40.0)}
    found = answer_specific_carry(rl, {"a": (91.5, 55.0), "b": (82.5, 50.0)})
    assert found.by_trunk == {"a": 5.0}
    assert found.left_out == ("b", "c")
