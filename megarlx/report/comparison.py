"""One comparison of a predicate: paired differences, their intervals, and the verdict on a range.

Differences are in percentage points, of the same questions on both sides. A trunk's difference is
the mean over its questions and checkpoints. The interval over trunks decides; that over questions
tells what other questions would have shown of these trunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from megarlx.evaluation.bootstrap import Interval, Values, differences, interval_of_suites
from megarlx.report.runs import Evaluation
from megarlx.report.student import TrunkInterval, interval_of_trunks
from megarlx.report.study import Cell

Verdict = Literal["held", "not held", "undetermined"]
Suites = dict[str, Values]  # suite -> question -> difference


@dataclass
class Comparison:
    """`what` is claimed to lie between `low` and `high` points."""

    what: str
    low: float
    high: float
    cells: list[tuple[Cell, Suites]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, cell: Cell, suites: Suites) -> None:
        found = {suite: values for suite, values in suites.items() if values}
        if found:
            self.cells.append((cell, found))
        else:
            self.left_out.append(f"{cell.run.name}: no questions that both sides were asked alike")

    @property
    def seeds(self) -> list[int]:
        return sorted({cell.seed for cell, _ in self.cells})

    @property
    def checkpoints(self) -> list[int]:
        return sorted({cell.checkpoint_tokens for cell, _ in self.cells})

    @property
    def by_trunk(self) -> dict[str, float]:
        """The mean difference of each trunk, over its questions and checkpoints."""
        return self._by_trunk(self.cells)

    def _by_trunk(self, cells: Sequence[tuple[Cell, Suites]]) -> dict[str, float]:
        own: dict[str, list[Suites]] = {}
        for cell, suites in cells:
            own.setdefault(_trunk(cell), []).append(suites)
        return {trunk: _mean_of_suites(several) for trunk, several in sorted(own.items())}

    def _at(self, checkpoint_tokens: int | None) -> list[tuple[Cell, Suites]]:
        if checkpoint_tokens is None:
            return self.cells
        return [(c, s) for c, s in self.cells if c.checkpoint_tokens == checkpoint_tokens]

    def over_trunks(self, checkpoint_tokens: int | None = None) -> TrunkInterval | None:
        found = self._by_trunk(self._at(checkpoint_tokens))
        return interval_of_trunks([*found.values()]) if found else None

    def over_questions(self, checkpoint_tokens: int | None = None) -> Interval | None:
        chosen = [suites for _, suites in self._at(checkpoint_tokens)]
        names = sorted({suite for suites in chosen for suite in suites})
        return interval_of_suites([[s[name] for s in chosen if name in s] for name in names])

    def verdict(self, checkpoint_tokens: int | None = None) -> Verdict:
        interval = self.over_trunks(checkpoint_tokens)
        if interval is None:
            return "undetermined"
        if self.low < interval.low and interval.high < self.high:
            return "held"
        if interval.high < self.low or self.high < interval.low:
            return "not held"
        return "undetermined"

    def evidence(self) -> dict[str, Any]:
        interval, these = self.over_trunks(), self.over_questions()
        by_trunk = self.by_trunk
        return {
            "difference": self.what,
            "claimed_between": [_number(self.low), _number(self.high)],
            "points": interval and _number(interval.estimate),
            "interval": interval and _bounds(interval),
            "trunks": len(by_trunk),
            "by_trunk": {trunk: _number(points) for trunk, points in by_trunk.items()},
            "signs": {
                "above": sum(points > 0 for points in by_trunk.values()),
                "below": sum(points < 0 for points in by_trunk.values()),
            },
            "these_trunks": {
                "interval_over_questions": these and _bounds(these),
                "questions": these.questions if these else 0,
            },
            "cells": len(self.cells),
            "seeds": self.seeds,
            "by_checkpoint": {
                str(tokens): found
                and {"points": _number(found.estimate), "interval": _bounds(found)}
                for tokens in self.checkpoints
                for found in [self.over_trunks(tokens)]
            },
            "by_group": self._by_group(),
            "left_out": self.left_out,
        }

    def _by_group(self) -> dict[str, float | None]:
        """Where questions are sorted into groups, easy and hard say: the difference in each."""
        groups: dict[str, str] = {}
        for cell, _ in self.cells:
            groups |= cell.headline.groups if cell.headline else {}
        found: dict[str, float | None] = {}
        for group in sorted(set(groups.values())):
            chosen = [
                {q: v for q, v in values.items() if groups.get(q) == group}
                for _, suites in self.cells
                for values in suites.values()
            ]
            interval = interval_of_suites([chosen])
            if interval is not None:
                found[group] = _number(interval.estimate)
        return found


def all_of(verdicts: Sequence[Verdict]) -> Verdict:
    if "not held" in verdicts:
        return "not held"
    return "held" if verdicts and set(verdicts) == {"held"} else "undetermined"


def of_suite(after: Evaluation | None, before: Evaluation | None, metric: str) -> Suites:
    if after is None or before is None or not after.asked_like(before):
        return {}
    return {after.suite: differences(after.percent(metric), before.percent(metric))}


def of_capability(after: Cell, before: Cell) -> Suites:
    """Of every accuracy suite that both have, and were asked alike."""
    found: Suites = {}
    for suite in after.accuracy_suites:
        found |= of_suite(after.evaluations[suite], before.evaluations.get(suite), "accuracy")
    return found


def _trunk(cell: Cell) -> str:
    """Excursions of one trunk stand together, whatever their seeds."""
    return cell.trunk.name if cell.trunk else f"seed {cell.seed}"


def _mean_of_suites(several: Sequence[Suites]) -> float:
    """Every suite weighs the same however many questions it has."""
    values: dict[str, list[float]] = {}
    for suites in several:
        for suite, by_question in suites.items():
            values.setdefault(suite, []).extend(by_question.values())
    return fmean(fmean(own) for own in values.values())


def _bounds(interval: Interval | TrunkInterval) -> list[float | None]:
    return [_number(interval.low), _number(interval.high)]


def _number(value: float) -> float | None:
    return round(value, 3) if math.isfinite(value) else None
