"""What happened to single questions, counted by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megarlx.evaluation.consistency import change, solved, through, transition


def result(correct: list[int], samples: int = 64, iteration: int = 0) -> dict[str, Any]:
    items = [{"id": f"q{i}", "samples": samples, "correct": c} for i, c in enumerate(correct)]
    return {"suite": "math", "kind": "pass_at_k", "iteration": iteration, "items": items}


def test_shares_are_of_what_could_be_kept_or_won() -> None:
    before = dict(zip("abcdefg", [True, True, True, False, False, False, False], strict=True))
    after = dict(zip("abcdefg", [True, True, False, True, False, False, False], strict=True))
    found = transition(before, after)
    assert (found.kept, found.acquired, found.forgotten, found.never) == (2, 1, 1, 3)
    assert found.retention == pytest.approx(2 / 3)
    assert found.forgetting == pytest.approx(1 / 3)
    assert found.acquisition == pytest.approx(1 / 4)
    assert found.flip_rate == pytest.approx(2 / 7)
    assert found.retention + found.forgetting == pytest.approx(1)


def test_where_nothing_was_solved_nothing_can_be_kept() -> None:
    found = transition({"a": False}, {"a": True})
    assert math.isnan(found.retention)
    assert (found.acquisition, found.flip_rate) == (1.0, 1.0)


def test_accuracy_that_stands_still_may_hide_that_every_question_flipped() -> None:
    found = transition({"a": True, "b": False}, {"a": False, "b": True})
    assert (found.retention, found.flip_rate) == (0.0, 1.0)


def test_solved_is_a_share_of_the_samples_or_the_one_answer() -> None:
    assert solved(result([31, 32, 64])) == {"q0": False, "q1": True, "q2": True}
    assert solved(result([1, 0]), from_share=1 / 64) == {"q0": True, "q1": False}
    choice = {"items": [{"id": "x", "correct": True, "margin": 0.1}]}
    assert solved(choice) == {"x": True}
    with pytest.raises(ValueError, match="of the kind perplexity"):
        solved({"suite": "s", "kind": "perplexity", "items": [{"id": "x", "nll": 1.0}]})


def test_a_run_is_followed_in_the_order_of_its_iterations() -> None:
    results = [
        result([64, 0], iteration=30),
        result([0, 0], iteration=10),
        result([64, 64], 64, 20),
    ]
    steps = through(results)
    assert [(a, b) for a, b, _ in steps] == [(10, 20), (20, 30)]
    assert [t.acquired for _, _, t in steps] == [2, 0]
    assert [t.forgotten for _, _, t in steps] == [0, 1]


def test_questions_that_only_one_was_asked_count_nowhere() -> None:
    found = transition({"a": True, "b": False}, {"a": True, "c": True})
    assert (found.kept, found.questions) == (1, 1)
    assert transition({}, {"a": True}).questions == 0


def test_transitions_of_several_pairs_are_counted_together() -> None:
    one = transition({"a": True, "b": False}, {"a": False, "b": True})
    both = one + transition({"a": True}, {"a": True})
    assert (both.kept, both.acquired, both.forgotten, both.never) == (1, 1, 1, 0)
    assert both.retention == 0.5


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ([4] * 20 + [0] * 20, [40] * 40, "expansion"),
        ([4] * 40, [64] * 20 + [0] * 20, "sharpening"),
        ([40] * 40, [0] * 20 + [10] * 20, "both fell"),
        ([10, 30] * 20, [10, 30] * 20, "undetermined"),
    ],
)
def test_verdicts_need_intervals_without_zero(
    before: list[int], after: list[int], verdict: str
) -> None:
    found = change(result(before), result(after), k=32)
    assert found.verdict == verdict
    assert found.at_1.low <= found.at_1.estimate <= found.at_1.high
    assert found.at_k.questions == 40
