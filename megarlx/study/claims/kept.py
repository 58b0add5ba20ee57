"""The numbers that the kept study is to reach: (a) and (b) in each of its worlds, (c) of facts that
only early RL saw. Where a folder holds several worlds, a claim is to hold in each that asks it.

    megarlx report runs/kept --claim megarlx.study.claims.kept:a
"""

from __future__ import annotations

from dataclasses import replace
from math import inf

from megarlx.report.claims import Claim
from megarlx.report.comparison import Comparison, Suites, of_capability, of_suite
from megarlx.report.measures import MATCHED
from megarlx.report.runs import Run
from megarlx.report.study import Study
from megarlx.study.kept.arms import (
    RL_VECTOR,
    SUITE,
    WITHHELD,
    Arms,
    cell_of,
    known,
    last_step,
    point,
    worlds_of,
)
from megarlx.study.kept.chosen import frozen_rates
from megarlx.study.kept.table import Table

STEPS = 20


def _differences(study: Study) -> list[Comparison]:
    found = []
    for world, trunks in worlds_of(study).items():
        if any(arms.late for arms in trunks):
            found += _with_late_steps(study, Table(trunks, frozen_rates(world)), world)
    return found


def _with_late_steps(study: Study, table: Table, world: str) -> list[Comparison]:
    transplant, alone = (f"{name} + {STEPS}" for name in ("transplant", "late-only"))
    first, wide, kept = (
        Comparison(f"{world}: {transplant} − {alone}, pass@1", 3.0, inf),
        Comparison(f"{world}: {transplant} − {alone}, pass@32", -2.0, inf),
        Comparison(f"{world}: {transplant} − the trunk's end, capability", -0.5, 0.5),
    )
    for arms in table.trunks:
        places = [table.late(start, STEPS)(arms) for start in (RL_VECTOR, "")]
        cell = None if places[0] is None else cell_of(study, places[0][0])
        if cell is None or places[0] is None or places[1] is None:
            left = f"seed {arms.seed}: not both are there, at the rates of {STEPS} steps"
            for one in (first, wide, kept):
                one.left_out.append(left)
            continue
        after, before = (run.at(step).get(SUITE) for run, step in (places[0], places[1]))
        first.add(cell, of_suite(after, before, "pass_at_1"))
        wide.add(cell, of_suite(after, before, "pass_at_32"))
        kept.add(cell, _capability(study, *places[0], arms))
    return [first, wide, kept]


def _capability(study: Study, run: Run, step: int, arms: Arms) -> Suites:
    found = cell_of(study, run)
    assert found is not None
    after = replace(found, evaluations=run.at(step))
    return of_capability(after, replace(found, evaluations=arms.trunk.at(arms.end)))


def _carry(study: Study) -> list[Comparison]:
    found = []
    for world, trunks in worlds_of(study).items():
        if any("vector-mark-matched" in arms.runs for arms in trunks):
            found.append(_carry_of(study, trunks, world))
    return found


def _carry_of(study: Study, trunks: list[Arms], world: str) -> Comparison:
    made = Comparison(f"{world}: RL's vector − mark-only vector at an equal m, pass@1", 0.0, inf)
    for arms in trunks:
        rl, mark = arms.runs.get(RL_VECTOR), arms.runs.get("vector-mark-matched")
        cell = None if rl is None else cell_of(study, rl)
        reached, other = point(rl), point(mark)
        if cell is None or rl is None or reached is None:
            continue
        apart = None if other is None else abs((reached.m or 0.0) - (other.m or 0.0))
        if mark is None or apart is None or apart > MATCHED:
            made.left_out.append(f"{rl.name}: no mark-only vector within {MATCHED:g} points of m")
            continue
        after, before = (run.at(last_step(run)).get(SUITE) for run in (rl, mark))
        made.add(cell, of_suite(after, before, "pass_at_1"))
    return made


def _transfer(study: Study) -> list[Comparison]:
    found = []
    for world, trunks in worlds_of(study).items():
        made = Comparison(f"{world}: P_K of the transplant − P_K of the trunk's end", 0.0, inf)
        for arms in trunks:
            run = arms.runs.get(RL_VECTOR)
            cell = None if run is None else cell_of(study, run)
            after, before = known(run, WITHHELD), known(arms.trunk, WITHHELD, arms.end)
            if cell is not None and after is not None and before is not None:
                made.add(cell, {WITHHELD: {"mean of the facts": after - before}})
        if made.cells:
            found.append(made)
    return found


a = Claim(
    f"with {STEPS} late steps a transplant is ahead of late-only RL by 3 points of pass@1, loses "
    "no more than 2 of pass@32, and keeps capability within 0.5",
    _differences,
)
b = Claim("RL's vector carries more than the form of the answer", _carry)
c = Claim("a transplant knows facts that only early RL saw", _transfer)
