"""Intervals over trunks: their quantiles, and how often they cover what they are to cover."""

import math

import numpy as np
import pytest

from megarlx.report.student import interval_of_trunks, t_quantile, within

# Two-sided 95% and 99%, as they are tabulated.
TABLE = {
    1: (12.7062, 63.6567),
    2: (4.3027, 9.9248),
    3: (3.1824, 5.8409),
    4: (2.7764, 4.6041),
    5: (2.5706, 4.0321),
    9: (2.2622, 3.2498),
    10: (2.2281, 3.1693),
    19: (2.0930, 2.8609),
    30: (2.0423, 2.7500),
    120: (1.9799, 2.6174),
}


@pytest.mark.parametrize("degrees", TABLE)
def test_quantiles_are_the_tabulated_ones(degrees: int) -> None:
    at_95, at_99 = TABLE[degrees]
    assert t_quantile(0.975, degrees) == pytest.approx(at_95, abs=6e-5)
    assert t_quantile(0.995, degrees) == pytest.approx(at_99, abs=6e-5)
    assert t_quantile(0.025, degrees) == -t_quantile(0.975, degrees)


@pytest.mark.parametrize("degrees", range(1, 40))
def test_a_quantile_is_where_the_chance_is_reached(degrees: int) -> None:
    for probability in (0.6, 0.9, 0.975, 0.999):
        t = t_quantile(probability, degrees)
        assert within(t, degrees) == pytest.approx(2 * probability - 1, abs=1e-12)


@pytest.mark.parametrize(("probability", "degrees"), [(0.0, 3), (1.0, 3), (0.9, 0)])
def test_what_has_no_quantile_is_refused(probability: float, degrees: int) -> None:
    with pytest.raises(ValueError, match=rf"probability is {probability} and degrees {degrees}"):
        t_quantile(probability, degrees)


@pytest.mark.parametrize("trunks", [2, 5, 10])
def test_95_of_100_studies_cover_the_true_mean(trunks: int) -> None:
    """Each trunk has a difference of its own, and each question of it one more."""
    draw, covered = np.random.default_rng(trunks), 0
    for _ in range(2000):
        own = draw.normal(1.7, 2.0, size=trunks)
        values = own + draw.normal(0.0, 20.0, size=(256, trunks)).mean(axis=0)
        interval = interval_of_trunks(values.tolist())
        covered += interval.low < 1.7 < interval.high
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


def test_one_trunk_bounds_nothing() -> None:
    assert interval_of_trunks([3.0]).estimate == 3.0
    assert interval_of_trunks([3.0]).low == -math.inf
    assert interval_of_trunks([3.0, 3.0]).high == 3.0
