"""What became of the single questions between two evaluations, and what RL did to coverage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from megarlx.report.comparison import of_suite
from megarlx.report.runs import Evaluation
from megarlx.report.statistics import Interval, interval_of_mean
from megarlx.report.study import BASE, Cell, Study


@dataclass(frozen=True)
class Moves:
    """Counts of questions, over all pairs of evaluations that were put together."""

    kept: int = 0  # solved before and after
    acquired: int = 0
    forgotten: int = 0
    never: int = 0

    def __add__(self, other: Moves) -> Moves:
        return Moves(
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


def moves(before: Evaluation | None, after: Evaluation | None) -> Moves:
    """Of the questions that both asked; a question is solved when half its samples are right."""
    if before is None or after is None:
        return Moves()
    earlier, later = before.solved(), after.solved()
    pairs = [(earlier[q], later[q]) for q in earlier if q in later]
    return Moves(
        pairs.count((True, True)),
        pairs.count((False, True)),
        pairs.count((True, False)),
        pairs.count((False, False)),
    )


def of_recipes(study: Study) -> dict[str, Moves]:
    """From the checkpoint to what a recipe made of it, over checkpoints and seeds."""
    found: dict[str, Moves] = {}
    for cell in study.cells:
        base = study.base_of(cell)
        if cell.recipe == BASE or base is None:
            continue
        found[cell.label] = found.get(cell.label, Moves()) + moves(base.headline, cell.headline)
    return {label: made for label, made in found.items() if made.questions}


def of_trunks(study: Study) -> dict[tuple[int, int], Moves]:
    """From each studied checkpoint of a trunk to its next, over trunks: (tokens, tokens)."""
    found: dict[tuple[int, int], Moves] = {}
    for trunk in study.trunks:
        bases = [c for c in study.of_recipe(BASE) if c.run is trunk and c.headline]
        for a, b in pairwise(sorted(bases, key=lambda c: c.checkpoint_tokens)):
            key = (a.checkpoint_tokens, b.checkpoint_tokens)
            found[key] = found.get(key, Moves()) + moves(a.headline, b.headline)
    return {key: made for key, made in sorted(found.items()) if made.questions}


@dataclass(frozen=True)
class Coverage:
    """Change against the base in percentage points: of one sample, and of 32 (or as many)."""

    k: int
    at_1: Interval
    at_k: Interval

    @property
    def kind(self) -> str:
        if self.at_k.low > 0:
            return "expansion"
        if self.at_k.high < 0 and self.at_1.low > 0:
            return "sharpening"
        if self.at_k.high < 0 and self.at_1.high < 0:
            return "both fell"
        return "undetermined"


def coverage(pairs: Sequence[tuple[Cell, Cell]], ks: Sequence[int]) -> Coverage | None:
    """Of an excursion's cells beside their base."""
    for k in sorted(ks, reverse=True):
        changes = [
            [
                values
                for cell, base in pairs
                for values in of_suite(cell.headline, base.headline, f"pass_at_{n}").values()
            ]
            for n in (1, k)
        ]
        at_1, at_k = (interval_of_mean(change) for change in changes)
        if at_1 is not None and at_k is not None:
            return Coverage(k, at_1, at_k)
    return None
