"""Intervals against every possible resample, and what pairing and cells are for."""

import itertools
import math
import statistics
from dataclasses import astuple

import numpy as np
import pytest

from megarlx.evaluation.bootstrap import (
    differences,
    interval_of_mean,
    interval_of_suites,
    paired_difference,
)


def values(numbers, start: int = 0) -> dict[str, float]:
    return {f"q{start + i}": float(x) for i, x in enumerate(numbers)}


def test_interval_is_that_of_all_resamples() -> None:
    numbers = [0.0, 0.1, 0.4, 0.5, 1.0]
    means = sorted(map(statistics.fmean, itertools.product(numbers, repeat=5)))
    found = interval_of_mean([values(numbers)])
    assert found is not None
    assert found.estimate == pytest.approx(0.4)
    assert found.low == pytest.approx(means[int(0.025 * len(means))], abs=0.03)
    assert found.high == pytest.approx(means[int(0.975 * len(means))], abs=0.03)


def test_interval_is_that_of_the_normal_law_where_questions_are_many() -> None:
    numbers = np.random.default_rng(1).normal(3, 2, 400)
    found = interval_of_mean([values(numbers)])
    half = 1.96 * statistics.stdev(numbers) / 20
    assert found is not None
    assert found.estimate == pytest.approx(numbers.mean())
    assert found.low == pytest.approx(numbers.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(numbers.mean() + half, abs=0.1 * half)
    assert found.questions == 400


def test_interval_holds_the_truth_about_nineteen_times_in_twenty() -> None:
    generator = np.random.default_rng(2)
    found = [interval_of_mean([values(generator.random(100) < 0.3)]) for _ in range(300)]
    hits = sum(i is not None and i.low <= 0.3 <= i.high for i in found)
    assert 0.90 <= hits / 300 <= 0.985


def test_asking_the_same_questions_in_more_cells_does_not_narrow_the_interval() -> None:
    cell = values(np.random.default_rng(3).random(60))
    one, five = interval_of_mean([cell]), interval_of_mean([cell] * 5)
    assert one is not None
    assert five is not None
    assert astuple(five) == pytest.approx(astuple(one))


def test_independent_questions_of_more_cells_do_narrow_it() -> None:
    numbers = np.random.default_rng(4).random((4, 60))
    one = interval_of_mean([values(numbers[0])])
    four = interval_of_mean([values(row, 60 * i) for i, row in enumerate(numbers)])
    assert one is not None
    assert four is not None
    assert four.high - four.low < 0.65 * (one.high - one.low)


def test_paired_differences_are_of_the_questions_that_both_hold() -> None:
    assert differences({"a": 3.0, "b": 1.0, "c": 9.0}, {"b": 4.0, "a": 1.0}) == {
        "a": 2.0,
        "b": -3.0,
    }


def test_pairing_removes_what_makes_questions_hard_for_both() -> None:
    hard = np.random.default_rng(5).normal(0, 10, 200)
    found = interval_of_mean([differences(values(hard + 1), values(hard))])
    assert found is not None
    assert astuple(found) == pytest.approx((1.0, 1.0, 1.0, 200))


def test_each_suite_weighs_the_same_however_long_it_is() -> None:
    found = interval_of_suites([[values([0.0] * 900)], [values([10.0] * 2)]])
    assert found is not None
    assert found.estimate == pytest.approx(5.0)


def test_a_question_missing_in_a_cell_counts_where_it_was_asked() -> None:
    found = interval_of_mean([{"a": 1.0, "b": 3.0}, {"a": 2.0}])
    assert found is not None
    assert found.estimate == pytest.approx(2.0)
    assert found.questions == 2


def test_nothing_has_no_interval_and_one_question_has_no_bounds() -> None:
    assert interval_of_mean([]) is None
    assert interval_of_mean([{}]) is None
    found = interval_of_mean([{"a": 1.0}])
    assert found is not None
    assert (found.low, found.high) == (-math.inf, math.inf)


def test_a_difference_of_models_sees_a_small_gain_on_questions_of_very_different_difficulty() -> (
    None
):
    hard = {f"q{i}": i / 100 for i in range(100)}
    better = {name: value + 0.02 for name, value in hard.items()}
    found = paired_difference(better, hard)
    assert found.above_zero
    assert (found.low, found.high) == (pytest.approx(0.02), pytest.approx(0.02))
    assert paired_difference(hard, better).below_zero


def test_a_difference_of_models_that_were_asked_other_questions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^bootstrap: 2 and 1 questions, different in b;"):
        paired_difference({"a": 1.0, "b": 1.0}, {"a": 1.0})
    with pytest.raises(ValueError, match=r"^bootstrap: 0 and 0 questions, different in none"):
        paired_difference({}, {})
