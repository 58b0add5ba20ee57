"""What becomes of single questions from checkpoint to checkpoint, and from parent to excursion.

Averages hide it: an accuracy that stands still may be a model that forgets as fast as it learns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megarlx.evaluation.bootstrap import Interval, paired_difference
from megarlx.evaluation.pass_at_k import pass_at_k

Result = Mapping[str, Any]  # one of results.py
Verdict = Literal["expansion", "sharpening", "both fell", "undetermined"]


def solved(result: Result, *, from_share: float = 0.5) -> dict[str, bool]:
    """Of each question by its id: whether at least that share of its samples is right, or whether
    its one answer is."""
    found = {}
    for item in result["items"]:
        correct = item.get("correct")
        if correct is None:
            raise ValueError(
                f"consistency: suite {result.get('suite')} is of the kind {result.get('kind')}, "
                "whose items are neither solved nor not; allowed are pass_at_k, choice, cloze"
            )
        is_share = not isinstance(correct, bool)
        found[item["id"]] = correct >= from_share * item["samples"] > 0 if is_share else correct
    return found


@dataclass(frozen=True)
class Transition:
    """Counts of the questions that two checkpoints share; shares are NaN where nothing can be."""

    kept: int = 0  # solved before and after
    acquired: int = 0
    forgotten: int = 0
    never: int = 0

    def __add__(self, other: Transition) -> Transition:
        """Over several pairs of checkpoints."""
        return Transition(
            self.kept + other.kept,
            self.acquired + other.acquired,
            self.forgotten + other.forgotten,
            self.never + other.never,
        )

    @property
    def questions(self) -> int:
        return self.kept + self.acquired + self.forgotten + self.never

    @property
    def retention(self) -> float:
        return _share(self.kept, self.kept + self.forgotten)

    @property
    def forgetting(self) -> float:
        return _share(self.forgotten, self.kept + self.forgotten)

    @property
    def acquisition(self) -> float:
        return _share(self.acquired, self.acquired + self.never)

    @property
    def flip_rate(self) -> float:
        return _share(self.acquired + self.forgotten, self.questions)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def transition(before: Mapping[str, bool], after: Mapping[str, bool]) -> Transition:
    """Of the questions that both were asked."""
    pairs = [(before[i], after[i]) for i in before if i in after]
    return Transition(
        pairs.count((True, True)),
        pairs.count((False, True)),
        pairs.count((True, False)),
        pairs.count((False, False)),
    )


def through(
    results: Sequence[Result], *, from_share: float = 0.5
) -> list[tuple[int, int, Transition]]:
    """(iteration, next iteration, what happened between) of a run's results of one suite."""
    ordered = sorted(results, key=lambda r: int(r["iteration"]))
    return [
        (
            int(a["iteration"]),
            int(b["iteration"]),
            transition(solved(a, from_share=from_share), solved(b, from_share=from_share)),
        )
        for a, b in itertools.pairwise(ordered)
    ]


@dataclass(frozen=True)
class Change:
    """From a parent to what was trained from it, on the same questions: of one sample, and of k.

    Expansion: what is reachable with k samples grew. Sharpening: it shrank while one sample got
    better. A verdict needs an interval that leaves zero out.
    """

    k: int
    at_1: Interval
    at_k: Interval

    @property
    def verdict(self) -> Verdict:
        if self.at_k.above_zero:
            return "expansion"
        if self.at_k.below_zero and self.at_1.above_zero:
            return "sharpening"
        if self.at_k.below_zero and self.at_1.below_zero:
            return "both fell"
        return "undetermined"


def change(parent: Result, child: Result, *, k: int = 32) -> Change:
    at_1, at_k = (paired_difference(at_each(child, n), at_each(parent, n)) for n in (1, k))
    return Change(k, at_1, at_k)


def at_each(result: Result, k: int) -> dict[str, float]:
    """pass@k of each question."""
    return {item["id"]: pass_at_k(item["samples"], item["correct"], k) for item in result["items"]}
