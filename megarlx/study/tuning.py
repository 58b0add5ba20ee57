"""Tuning by rule: of each recipe the settings with the highest mean of pass@1, @8 and @32.

Over all tuning seeds, on validation questions. What is dialled (say the foreign share of
demonstrations) has a choice for each of its values. The value is that with most of P3, P4, P5 and
P7 in the paper's direction on every seed, and of equals the one whose weakest effect is the largest
in standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from megarlx.evaluation.bootstrap import Values, differences
from megarlx.evaluation.pass_at_k import mean_and_error
from megarlx.report.runs import Evaluation
from megarlx.report.settings import setting_named
from megarlx.report.study import KS, Cell, Study
from megarlx.study.claims.paper import start_of_rl

DIALS = ("foreign_share", "fact_skew")
STEPS = ("rl", "sft_then_rl", "parallel", "sft_gold")  # in this order
MOST_RUNS = 40


@dataclass(frozen=True)
class Candidate:
    """One setting of a recipe; of SFT→RL, what its SFT reached is measured."""

    label: str
    recipe: str
    dial: str
    cells: Mapping[int, Cell]  # by seed
    measured: Mapping[int, Evaluation]

    def by_seed(self, k: int) -> list[float]:
        return [100 * self.measured[seed].metrics[f"pass_at_{k}"] for seed in sorted(self.measured)]

    @property
    def mean(self) -> float:
        return fmean(fmean(self.by_seed(k)) for k in KS)


@dataclass(frozen=True)
class Dial:
    """What the choices at one value of the dial show of the claims that oppose each other."""

    value: str
    in_direction: tuple[str, ...]  # on every seed
    weakest: float  # effect in standard errors, of all of them and of all seeds
    effects: Mapping[str, Sequence[float]]  # of each claim: points, by seed


def candidates(study: Study) -> list[Candidate]:
    """Those that were run with every seed; of each recipe in its order."""
    found: dict[tuple[str, str], dict[int, Cell]] = {}
    for cell in study.cells:
        if cell.recipe in STEPS and cell.headline is not None:
            found.setdefault((cell.recipe, cell.label), {})[cell.seed] = cell
    made = [
        _candidate(study, recipe, label, cells)
        for (recipe, label), cells in found.items()
        if set(cells) == set(study.seeds)
    ]
    return sorted(made, key=lambda one: (STEPS.index(one.recipe), one.dial, one.label))


def chosen(found: Sequence[Candidate]) -> list[Candidate]:
    """Of each recipe and value of the dial."""
    groups: dict[tuple[str, str], list[Candidate]] = {}
    for one in found:
        groups.setdefault((one.recipe, one.dial), []).append(one)
    return [max(group, key=lambda one: one.mean) for group in groups.values()]


def dials(study: Study, found: Sequence[Candidate]) -> list[Dial]:
    """The best value first."""
    best = chosen(found)
    rl = next((one for one in best if one.recipe == "rl"), None)
    made = [_dial(study, rl, one) for one in best if rl is not None and one.recipe == "sft_then_rl"]
    return sorted(made, key=lambda dial: (-len(dial.in_direction), -dial.weakest))


def _candidate(study: Study, recipe: str, label: str, cells: Mapping[int, Cell]) -> Candidate:
    own = ((seed, _measured(study, cell)) for seed, cell in cells.items())
    settings = next(iter(cells.values())).run
    named = ((name, setting_named(settings, name)) for name in DIALS)
    dial = ", ".join(f"{name} {value}" for name, value in named if value is not None)
    dial = dial if recipe == "sft_then_rl" else ""
    return Candidate(label, recipe, dial, cells, {seed: e for seed, e in own if e is not None})


def _measured(study: Study, cell: Cell) -> Evaluation | None:
    return start_of_rl(study, cell) if cell.recipe == "sft_then_rl" else cell.headline


def _dial(study: Study, rl: Candidate, sft_then_rl: Candidate) -> Dial:
    effects: dict[str, list[float]] = {}
    in_errors: dict[str, list[float]] = {}
    for seed in sorted(sft_then_rl.cells):
        for claim, values in _effects(study, rl.cells[seed], sft_then_rl, seed):
            estimate = mean_and_error([*values.values()])
            effects.setdefault(claim, []).append(estimate.mean)
            in_errors.setdefault(claim, []).append(_ratio(estimate.mean, estimate.standard_error))
    claims = {claim.partition(",")[0] for claim in effects}
    held = tuple(
        name
        for name in sorted(claims)
        if all(v > 0 for claim, own in effects.items() if claim.startswith(name) for v in own)
    )
    return Dial(sft_then_rl.dial, held, min(min(own) for own in in_errors.values()), effects)


def _effects(study: Study, rl: Cell, both: Candidate, seed: int) -> Iterator[tuple[str, Values]]:
    """Each claim as a difference that is above 0 in the paper's direction."""
    sft, end = both.measured[seed], both.cells[seed].headline
    begin = start_of_rl(study, rl)
    assert end is not None
    assert rl.headline is not None
    assert begin is not None

    def between(after: Evaluation, before: Evaluation, k: int) -> Values:
        return differences(after.percent(f"pass_at_{k}"), before.percent(f"pass_at_{k}"))

    yield "P3", between(rl.headline, sft, 1)
    yield "P4", between(end, sft, 1)
    yield "P5", between(sft, end, 32)
    yield "P7, pass@1", between(rl.headline, begin, 1)
    yield "P7, pass@32", between(rl.headline, begin, 32)


def _ratio(effect: float, error: float) -> float:
    return effect / error if error > 0 else math.copysign(math.inf, effect) if effect else 0.0
