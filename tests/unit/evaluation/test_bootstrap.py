"""Intervals against every possible resample, and what pairing and strata are for."""

import itertools
import random
import statistics

import pytest

from megarlx.evaluation.bootstrap import bootstrap, paired_difference, pooled_difference


def test_interval_is_that_of_all_resamples() -> None:
    values = [0.0, 0.1, 0.4, 0.5, 1.0]
    means = sorted(map(statistics.fmean, itertools.product(values, repeat=5)))
    found = bootstrap([values], resamples=200_000)
    assert found.mean == pytest.approx(0.4)
    assert found.low == pytest.approx(means[int(0.025 * len(means))], abs=0.011)
    assert found.high == pytest.approx(means[int(0.975 * len(means))], abs=0.011)


def test_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    draw = random.Random(3)
    held = 0
    for number in range(200):
        values = [float(draw.random() < 0.3) for _ in range(80)]
        found = bootstrap([values], seed=number, resamples=1000)
        held += found.low <= 0.3 <= found.high
    assert 0.88 <= held / 200 <= 0.99


def test_same_seed_gives_the_same_interval() -> None:
    values = [[0.2, 0.5, 0.9], [0.1, 0.3]]
    assert bootstrap(values, seed=4) == bootstrap(values, seed=4)
    assert bootstrap(values, seed=4) != bootstrap(values, seed=5)


def test_pairing_sees_a_small_gain_on_questions_of_very_different_difficulty() -> None:
    hard = {f"q{i}": i / 100 for i in range(100)}
    better = {name: value + 0.02 for name, value in hard.items()}
    found = paired_difference(better, hard)
    assert found.above_zero
    assert found.low == pytest.approx(0.02)
    assert found.high == pytest.approx(0.02)
    assert paired_difference(hard, better).below_zero


def test_strata_weigh_the_same_and_checkpoints_of_one_seed_are_no_new_questions() -> None:
    one = {"a": 1.0, "b": 0.0, "c": 1.0}
    zero = dict.fromkeys(one, 0.0)
    once = pooled_difference([[(one, zero)]])
    often = pooled_difference([[(one, zero)] * 10])
    assert (once.low, once.high) == (often.low, often.high)
    other = {"x": -1.0}
    mixed = pooled_difference([[(one, zero)], [(other, {"x": 0.0})]])
    assert mixed.mean == pytest.approx((2 / 3 - 1) / 2)
    assert mixed.questions == 4


def test_questions_that_are_not_the_same_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^bootstrap: the questions differ in b \(1 in all\)"):
        paired_difference({"a": 1.0, "b": 1.0}, {"a": 1.0})
    for strata in ([], [[]], [[1.0], []]):
        with pytest.raises(ValueError, match=r"^bootstrap: strata of"):
            bootstrap(strata)
