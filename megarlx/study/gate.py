"""The gate: is a world one in which competence grows smoothly, and much alike over seeds?

Four lines at each checkpoint; their limits were fixed before the world was measured.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import correlation, fmean, stdev, variance
from typing import TypeVar

from megarlx.evaluation.pass_at_k import mean_and_error
from megarlx.report.runs import Evaluation
from megarlx.report.study import BASE, Cell, Study

SPREAD_OF_RIGHT = 4.0  # points, of P(right | marked) over seeds
SPREAD_AFTER_RL = 5.0  # points, of pass@1
MARKED = (4.0, 20.0)  # percent, in every seed
COVERAGE = (30.0, 80.0)  # percent of pass@32, mean of the bases
COVERAGE_AFTER_RL = 95.0
LOOKUPS = "lookups"
K = TypeVar("K")


@dataclass(frozen=True)
class Line:
    """One demand at one checkpoint; `held` is None where there is nothing to judge by."""

    checkpoint_tokens: int
    demand: str
    found: str
    held: bool | None


@dataclass(frozen=True)
class Spread:
    """A standard deviation over seeds, whole and without what sampling adds to it."""

    whole: float
    between: float

    @classmethod
    def of(cls, values: Sequence[float], errors: Sequence[float]) -> Spread:
        whole = variance(values)
        sampling = fmean(error**2 for error in errors)
        return cls(math.sqrt(whole), math.sqrt(max(0.0, whole - sampling)))


def gate(study: Study) -> list[Line]:
    made = [
        line for judge in (_right, _after_rl, _marked_and_covered, _rising) for line in judge(study)
    ]
    return sorted(made, key=lambda line: line.checkpoint_tokens)


def passed(lines: Sequence[Line]) -> bool | None:
    """None where something is still to be measured."""
    held = [line.held for line in lines]
    if False in held:
        return False
    return None if None in held or not held else True


def _right(study: Study) -> Iterator[Line]:
    for tokens, found in _headlines(study, BASE):
        demand = f"standard deviation of P(right | marked) over seeds at most {SPREAD_OF_RIGHT:g}"
        yield _of_spread(tokens, demand, found, "right_of_marked", SPREAD_OF_RIGHT, "between")


def _after_rl(study: Study) -> Iterator[Line]:
    for tokens, found in _headlines(study, "rl"):
        demand = f"standard deviation of pass@1 after RL over seeds at most {SPREAD_AFTER_RL:g}"
        yield _of_spread(tokens, demand, found, "pass_at_1", SPREAD_AFTER_RL, "whole")


def _of_spread(
    tokens: int, demand: str, found: Sequence[Evaluation], metric: str, most: float, judged: str
) -> Line:
    """Judged is the spread without sampling where the gate says so, else the whole."""
    known = [e for e in found if metric in e.metrics]
    if len(known) < 2:
        return Line(tokens, demand, f"{len(known)} seeds", None)
    values = [100 * e.metrics[metric] for e in known]
    spread = Spread.of(values, [_error(e, metric) for e in known])
    text = (
        f"{getattr(spread, judged):.1f} (mean {fmean(values):.1f}; with sampling "
        f"{spread.whole:.1f}, without {spread.between:.1f}; {_all(values)})"
    )
    return Line(tokens, demand, text, getattr(spread, judged) <= most)


def _error(evaluation: Evaluation, metric: str) -> float:
    """In points: as measured, or from the counts of the questions."""
    if metric in evaluation.standard_errors:
        return 100 * evaluation.standard_errors[metric]
    return mean_and_error([*evaluation.percent(metric).values()]).standard_error


def _marked_and_covered(study: Study) -> Iterator[Line]:
    bases, after = dict(_headlines(study, BASE)), dict(_headlines(study, "rl"))
    for tokens, found in bases.items():
        marked = _percent(found, "marked")
        demand = f"marked share {MARKED[0]:g} to {MARKED[1]:g}% in every seed"
        held = all(MARKED[0] <= share <= MARKED[1] for share in marked) if marked else None
        yield Line(tokens, demand, _all(marked), held)
        covered = _percent(found, "pass_at_32")
        demand = f"mean pass@32 of the bases {COVERAGE[0]:g} to {COVERAGE[1]:g}%"
        yield _of_mean(tokens, demand, covered, lambda mean: COVERAGE[0] <= mean <= COVERAGE[1])
        covered = _percent(after.get(tokens, []), "pass_at_32")
        demand = f"mean pass@32 after RL below {COVERAGE_AFTER_RL:g}%"
        yield _of_mean(tokens, demand, covered, lambda mean: mean < COVERAGE_AFTER_RL)


def _of_mean(
    tokens: int, demand: str, values: Sequence[float], holds: Callable[[float], bool]
) -> Line:
    if not values:
        return Line(tokens, demand, "no seeds", None)
    return Line(tokens, demand, f"{fmean(values):.1f} ({_all(values)})", holds(fmean(values)))


def _rising(study: Study) -> Iterator[Line]:
    """From each checkpoint to the next."""
    bases = _cells(study, BASE)
    known = {
        tokens: {cell.seed: looked_up(cell) for cell in cells} for tokens, cells in bases.items()
    }
    checkpoints = sorted(known)
    for before, tokens in itertools.pairwise(checkpoints):
        rises = [
            now - then
            for seed, now in known[tokens].items()
            if now is not None and (then := known[before].get(seed)) is not None
        ]
        demand = f"lookups known better than at {before:,} tokens in every seed"
        yield Line(tokens, demand, _all(rises, "+.1f"), min(rises) > 0 if rises else None)


def looked_up(cell: Cell) -> float | None:
    """Percent: the mean probability of the right value."""
    found = cell.evaluations.get(LOOKUPS)
    return None if found is None else 100 * found.metrics["probability"]


def known(study: Study) -> Iterator[str]:
    """No demand: how differently seeds know their lookups, and how the rest goes with that."""
    for tokens, cells in _cells(study, BASE).items():
        shares = {c.seed: value for c in cells if (value := looked_up(c)) is not None}
        if len(shares) < 3:
            continue
        right = _by_seed(study, BASE, "right_of_marked", tokens)
        after = _by_seed(study, "rl", "pass_at_1", tokens)
        yield (
            f"{tokens:,} tokens: lookups known over seeds, mean {fmean(shares.values()):.1f}, "
            f"standard deviation {stdev(shares.values()):.1f}; correlation with "
            f"P(right | marked) {correlation_of(shares, right)}, with pass@1 after RL "
            f"{correlation_of(shares, after)}"
        )


def _by_seed(study: Study, recipe: str, metric: str, tokens: int) -> dict[int, float]:
    cells = _cells(study, recipe).get(tokens, [])
    return {
        c.seed: c.headline.metrics[metric]
        for c in cells
        if c.headline and metric in c.headline.metrics
    }


def correlation_of(one: Mapping[K, float], other: Mapping[K, float]) -> str:
    """Of seeds, or trunks, that have both; "–" where there are few, or nothing differs."""
    seeds = [seed for seed in one if seed in other]
    pairs = [one[seed] for seed in seeds], [other[seed] for seed in seeds]
    if len(seeds) < 3 or min(map(stdev, pairs)) == 0:
        return "–"
    return f"{correlation(*pairs):.2f}"


def _cells(study: Study, recipe: str) -> dict[int, list[Cell]]:
    found: dict[int, list[Cell]] = {}
    for cell in study.of_recipe(recipe):
        if cell.checkpoint_tokens in study.checkpoints:
            found.setdefault(cell.checkpoint_tokens, []).append(cell)
    return found


def _headlines(study: Study, recipe: str) -> Iterator[tuple[int, list[Evaluation]]]:
    for tokens, cells in _cells(study, recipe).items():
        yield tokens, [cell.headline for cell in cells if cell.headline]


def _percent(found: Sequence[Evaluation], metric: str) -> list[float]:
    return [100 * e.metrics[metric] for e in found if metric in e.metrics]


def _all(values: Sequence[float], form: str = ".1f") -> str:
    return ", ".join(f"{value:{form}}" for value in values) or "no seeds"
