"""pass@k against counting every subset of the pool."""

import itertools
import math
import statistics
from collections import Counter
from fractions import Fraction

import pytest

from megarlx.evaluation.pass_at_k import (
    Pool,
    guessing_pass_at_k,
    informative_share,
    pass_at_k,
)


@pytest.mark.parametrize("samples", range(1, 9))
def test_equals_the_share_of_subsets_that_hold_a_correct_sample(samples: int) -> None:
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        subsets = list(itertools.combinations(range(samples), k))
        solved = sum(any(i < correct for i in subset) for subset in subsets)
        assert pass_at_k(samples, correct, k) == pytest.approx(solved / len(subsets), abs=1e-15)


@pytest.mark.parametrize("samples", [64, 1000, 100_000])
def test_large_pools_lose_no_digits(samples: int) -> None:
    for correct, k in itertools.product((0, 1, 2, samples // 2, samples - 1, samples), (1, 8, 32)):
        exact = 1 - Fraction(math.comb(samples - correct, k), math.comb(samples, k))
        assert pass_at_k(samples, correct, k) == pytest.approx(float(exact), rel=1e-9, abs=1e-15)


def test_pass_at_1_is_the_share_of_correct_samples_and_pass_at_all_whether_any_is() -> None:
    for correct in range(65):
        assert pass_at_k(64, correct, 1) == pytest.approx(correct / 64, abs=1e-15)
        assert pass_at_k(64, correct, 64) == (correct > 0)


def test_estimate_is_the_mean_over_questions_with_its_standard_error() -> None:
    pool = Pool.of([[True, False, False, False], [True] * 4, [False] * 4, [True, True, False]])
    assert (pool.samples, pool.correct) == ((4, 4, 4, 3), (1, 4, 0, 2))
    assert pool.largest_k == 3
    for k in (1, 2, 3):
        values = pool.per_question(k)
        assert values == [
            pass_at_k(n, c, k) for n, c in zip(pool.samples, pool.correct, strict=True)
        ]
        found = pool.estimate(k)
        assert found.mean == pytest.approx(statistics.fmean(values))
        assert found.standard_error == pytest.approx(statistics.stdev(values) / 2)
        assert found.questions == 4
    assert math.isnan(Pool((4,), (1,)).estimate(1).standard_error)


def test_guessing_solves_what_drawing_answers_blindly_solves() -> None:
    answers = [1, 1, 1, 2, 3]
    for k in (1, 2, 4):
        draws = list(itertools.product(answers, repeat=k))
        solved = [sum(answer in draw for draw in draws) / len(draws) for answer in answers]
        assert guessing_pass_at_k(answers, k) == pytest.approx(statistics.fmean(solved))
    assert guessing_pass_at_k(["7"] * 4, 3) == 1


@pytest.mark.parametrize(("samples", "correct", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_impossible_numbers_are_refused(samples: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match=r"^pass_at_k: (correct|k) is -?\d+; allowed are"):
        pass_at_k(samples, correct, k)


def test_impossible_pools_are_refused() -> None:
    for samples, correct in (((), ()), ((4,), ()), ((4,), (5,)), ((0,), (0,))):
        with pytest.raises(ValueError, match=r"^pass_at_k: "):
            Pool(samples, correct)


@pytest.mark.parametrize("rewards", [[0, 0, 1, 1, 1, 1], [1, 1, 1], [0, 1, 1, 2, 2, 2]])
@pytest.mark.parametrize("unknown", [0, 1, 3])
def test_informative_share_is_that_of_subsets_with_two_rewards(
    rewards: list[int], unknown: int
) -> None:
    alike = list(Counter(rewards).values())
    pool = [*rewards, *[None] * unknown]
    for size in range(2, len(pool) + 1):
        groups = list(itertools.combinations(pool, size))
        mixed = sum(len({*group} - {None}) > 1 for group in groups)
        found = informative_share(len(pool), alike, size)
        assert found == pytest.approx(mixed / len(groups), abs=1e-12)


def test_where_no_reward_is_known_nothing_informs() -> None:
    assert informative_share(4, [], 2) == 0


def test_guessing_without_ones_own_answer_draws_from_the_others() -> None:
    answers = [1, 1, 1, 2, 3, 3]
    for k in (1, 2, 3):
        solved = []
        for at, answer in enumerate(answers):
            others = answers[:at] + answers[at + 1 :]
            draws = list(itertools.product(others, repeat=k))
            solved.append(sum(answer in draw for draw in draws) / len(draws))
        found = guessing_pass_at_k(answers, k, leave_one_out=True)
        assert found == pytest.approx(statistics.fmean(solved))
    with pytest.raises(ValueError, match="1 answers and k = 2; allowed are at least 2 and 1"):
        guessing_pass_at_k([1], 2, leave_one_out=True)
