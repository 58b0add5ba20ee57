"""How α is chosen, on made measurements."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarlx.config.evaluation import SuiteConfig
from megarlx.run.directory import RunError
from megarlx.run.transplant import EVALUATIONS, WITHIN, bisected, choosing_suite, highest_of


def suite(name: str, split: str = "validation", kind: str = "pass_at_k") -> SuiteConfig:
    return SuiteConfig.model_validate(
        {"name": name, "kind": kind, "split": split, "made": "problems"}
    )


@given(st.floats(0.0, 2.0), st.floats(0.2, 1.0))
def test_a_match_is_near_enough_in_at_most_8_evaluations(root: float, slope: float) -> None:
    tried: list[float] = []

    def measure(alpha: float) -> float:
        tried.append(alpha)
        return slope * alpha

    found = bisected(measure, slope * root)
    assert abs(slope * found - slope * root) <= WITHIN
    assert len(tried) <= EVALUATIONS
    assert all(0 <= alpha <= 2 for alpha in tried)


@pytest.mark.parametrize(("value", "nearest"), [(0.2, "0.0078125"), (0.95, "1.99219")])
def test_a_match_that_is_not_reached_names_the_nearest(value: float, nearest: str) -> None:
    """A share that α hardly moves, above or below what is wanted."""

    def measure(alpha: float) -> float:
        return 0.5 + 1e-3 * alpha

    with pytest.raises(RunError, match=f"the nearest is α = {nearest} with 0.50"):
        bisected(measure, value)


@given(st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.5]), min_size=1, unique=True), st.data())
def test_of_alphas_the_highest_is_kept_and_ties_go_to_the_smaller(
    alphas: list[float], data: st.DataObject
) -> None:
    values = {a: data.draw(st.sampled_from([0.1, 0.2, 0.3])) for a in alphas}
    found = highest_of(alphas, values.__getitem__)
    assert values[found] == max(values.values())
    assert all(found <= alpha for alpha in alphas if values[alpha] == values[found])


def test_a_suite_to_choose_by_is_one_of_validation_and_no_other() -> None:
    test, one, two = suite("math", "test"), suite("v1"), suite("v2")
    facts = suite("facts", "validation", "choice")
    assert choosing_suite([test, one, facts], None) is one
    assert choosing_suite([test, one, two], "v2") is two
    refused = [
        (None, [test], "0 pass_at_k suites"),
        (None, [one, two], r"2 pass_at_k suites .*\(v1, v2\)"),
        ("math", [test, one], "split = 'test'.* allowed are v1"),
        ("facts", [facts, one], "of kind choice"),
        ("none", [one], "it is none"),
    ]
    for name, there, why in refused:
        with pytest.raises(RunError, match=why):
            choosing_suite(there, name)
