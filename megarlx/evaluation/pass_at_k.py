"""Unbiased pass@k, for every k, from one pool of samples per question."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that k samples, drawn from a pool without putting back, hold a correct one.

    1 - C(samples - correct, k) / C(samples, k), as a product of factors between 0 and 1: no number
    on the way is large, and none is a difference of near ones.
    """
    if not 0 <= correct <= samples:
        raise ValueError(f"pass_at_k: correct is {correct}; allowed are 0 to samples = {samples}")
    if not 1 <= k <= samples:
        raise ValueError(f"pass_at_k: k is {k}; allowed are 1 to samples = {samples}")
    wrong = samples - correct
    if wrong < k:
        return 1.0
    if correct <= k:
        return 1.0 - math.prod(1.0 - k / i for i in range(wrong + 1, samples + 1))
    return 1.0 - math.prod(1.0 - correct / i for i in range(samples - k + 1, samples + 1))


@dataclass(frozen=True)
class Estimate:
    mean: float
    standard_error: float  # of the mean over questions; NaN for a single question
    questions: int


@dataclass(frozen=True)
class Pool:
    """Of each question: how many samples were drawn, and how many were correct."""

    samples: tuple[int, ...]
    correct: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.samples) != len(self.correct) or not self.samples:
            raise ValueError(
                f"pass_at_k: samples of {len(self.samples)} questions and correct of "
                f"{len(self.correct)}; allowed are as many of each, at least 1"
            )
        for at, (n, c) in enumerate(zip(self.samples, self.correct, strict=True)):
            if not 0 <= c <= n or n == 0:
                raise ValueError(f"pass_at_k: question {at} has {c} correct of {n} samples")

    @staticmethod
    def of(outcomes: Sequence[Sequence[bool]]) -> Pool:
        """From whether each sample of each question was correct."""
        return Pool(tuple(len(o) for o in outcomes), tuple(sum(map(bool, o)) for o in outcomes))

    @property
    def largest_k(self) -> int:
        return min(self.samples)

    def per_question(self, k: int) -> list[float]:
        pairs = zip(self.samples, self.correct, strict=True)
        return [pass_at_k(n, c, k) for n, c in pairs]

    def estimate(self, k: int) -> Estimate:
        return mean_and_error(self.per_question(k))


def mean_and_error(values: Sequence[float]) -> Estimate:
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, math.nan, 1)
    variance = math.fsum((v - mean) ** 2 for v in values) / (count - 1)
    return Estimate(mean, math.sqrt(variance / count), count)


def informative_share(samples: int, alike: Sequence[int], group_size: int) -> float:
    """The chance that a group drawn from the pool holds two different rewards.

    Only from such groups does group-relative RL learn anything. `alike`: how many samples have
    the one, the next … known reward; one whose reward is not known differs from none.
    """
    known = sum(alike)
    others = [pass_at_k(samples, known - count, group_size) for count in alike]
    return math.fsum(others) - (len(alike) - 1) * pass_at_k(samples, known, group_size)


def guessing_pass_at_k(
    answers: Sequence[Hashable], k: int, *, leave_one_out: bool = False
) -> float:
    """pass@k of k guesses drawn from the answers of all questions, without reading the question.

    A question whose answer has the share p of all answers is solved with the chance 1 - (1 - p)^k.
    What a model reaches below this is no sign that it can solve anything. With `leave_one_out` a
    question's own answer is not among those drawn from: of few questions with nearly as many
    answers, it would be worth too much.
    """
    if len(answers) < 1 + leave_one_out or k < 1:
        raise ValueError(
            f"guessing_pass_at_k: {len(answers)} answers and k = {k}; allowed are at least "
            f"{1 + leave_one_out} and 1"
        )
    total = len(answers)
    if leave_one_out:
        return math.fsum(
            n / total * (1.0 - (1.0 - (n - 1) / (total - 1)) ** k)
            for n in Counter(answers).values()
        )
    return math.fsum(
        n / total * (1.0 if n == total else -math.expm1(k * math.log1p(-n / total)))
        for n in Counter(answers).values()
    )
