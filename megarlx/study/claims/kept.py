"""The numbers that the kept study is to reach: (a) and (b) in each of its worlds, (c) of facts that
only early RL saw.

    megarlx report runs/kept --claim megarlx.study.claims.kept:a
"""

from __future__ import annotations

from dataclasses import replace
from math import inf

from megarlx.report.claims import Claim
from megarlx.report.comparison import Comparison, Suites, of_capability, of_suite
from megarlx.report.measures import MATCHED
from megarlx.report.runs import Run
from megarlx.report.study import Cell, Study
from megarlx.study.kept.arms import SUITE, Arms, arms_of, cell_of, known, last_step, point
from megarlx.study.kept.chosen import frozen_rates
from megarlx.study.kept.table import Table

STEPS = 20


def _differences(study: Study) -> list[Comparison]:
    table = Table(arms_of(study), frozen_rates(study.root.resolve().name))
    first, wide, kept = (
        Comparison(f"transplant + {STEPS} − late-only + {STEPS}, pass@1", 3.0, inf),
        Comparison(f"transplant + {STEPS} − late-only + {STEPS}, pass@32", -2.0, inf),
        Comparison(f"transplant + {STEPS} − the trunk's end, capability", -0.5, 0.5),
    )
    for arms in table.trunks:
        places = [table.late(start, STEPS)(arms) for start in ("vector-rl", "")]
        cell = None if places[0] is None else cell_of(study, places[0][0])
        if cell is None or places[0] is None or places[1] is None:
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
    made = Comparison("RL's vector − mark-only vector at an equal m, pass@1", 0.0, inf)
    for arms in arms_of(study):
        rl, mark = arms.runs.get("vector-rl"), arms.runs.get("vector-mark-matched")
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
    return [made]


def _transfer(study: Study) -> list[Comparison]:
    made = Comparison("P_K of the transplant − P_K of the trunk's end", 0.0, inf)
    for arms in arms_of(study):
        run = arms.runs.get("vector-rl")
        cell: Cell | None = None if run is None else cell_of(study, run)
        after, before = known(run), known(arms.trunk, arms.end)
        if cell is not None and after is not None and before is not None:
            made.add(cell, {"withheld": {"mean of the facts": after - before}})
    return [made]


a = Claim(
    f"with {STEPS} late steps a transplant is ahead of late-only RL by 3 points of pass@1, loses "
    "no more than 2 of pass@32, and keeps capability within 0.5",
    _differences,
)
b = Claim("RL's vector carries more than the form of the answer", _carry)
c = Claim("a transplant knows facts that only early RL saw", _transfer)
