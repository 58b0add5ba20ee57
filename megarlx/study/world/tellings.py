"""What pre-training text tells of the facts of tables: rightly, wrongly, or not at all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from megarlx.data.draw import Draw, Split
from megarlx.data.token_files import write_atomically
from megarlx.study.world.problems import Problem, Step, problem_at
from megarlx.study.world.settings import WorldError, WorldSettings
from megarlx.study.world.tables import Lookup, Tables, tables_of

FILE = "tellings.json"


class Telling(NamedTuple):
    number: int  # of the fact
    right: bool


def text_problem(settings: WorldSettings, split: Split, index: int) -> Problem:
    """Problem `index` of pre-training text, as it is told there."""
    problem = problem_at(settings, split, index, "text")
    if not settings.is_of_tables:
        return problem
    return _as_told(problem, tables_of(settings), Draw(settings.seed, "told", split, index))


def _as_told(problem: Problem, tables: Tables, draw: Draw) -> Problem:
    """A step behind a wrong value goes on from there: each one told is one fact's own value."""
    settings, value = tables.settings, problem.start[0]
    steps: list[Step] = []
    for step in problem.steps:
        at, place = Lookup(step.operand, value), draw.uniform()
        left_out = place < settings.partial_share
        wrong = settings.partial_share <= place < settings.partial_share + settings.wrong_share
        wrong = not left_out and (wrong or tables.number(at) in tables.told_wrongly)
        value = tables.wrong(at) if wrong else tables.result(at)
        steps.append(replace(step, values=(value,), told=not left_out))
    return replace(problem, steps=tuple(steps))


def is_silent(problem: Problem, settings: WorldSettings) -> bool:
    """Whether the steps as told would tell a fact that no text may tell."""
    if not settings.withheld:
        return False
    tables = tables_of(settings)
    return not tables.withheld.isdisjoint(map(tables.number, problem.lookups))


def tellings(problem: Problem, style: str, settings: WorldSettings) -> list[Telling]:
    """Those of a solution to a problem as it is told. Where the value before a step is not
    written, as the step before is left out, nothing is told."""
    tables, found, written = tables_of(settings), [], True
    for at, step in zip(problem.lookups, problem.steps, strict=True):
        if step.told and (written or style == "calculate"):
            found.append(Telling(tables.number(at), step.values[0] == tables.result(at)))
        written = step.told
    return found


@dataclass(frozen=True)
class Counts:
    """Of each fact by its number: how often the documents tell it."""

    right: tuple[int, ...]
    wrong: tuple[int, ...]

    @classmethod
    def of(cls, told: Iterable[Telling], facts: int) -> Counts:
        counted = Counter(told)
        right, wrong = (
            tuple(counted[Telling(number, is_right)] for number in range(facts))
            for is_right in (True, False)
        )
        return cls(right, wrong)

    def write(self, folder: Path) -> None:
        write_atomically(folder / FILE, self.to_json() + "\n")

    def to_json(self) -> str:
        return json.dumps({"right": self.right, "wrong": self.wrong})

    @classmethod
    def read(cls, folder: Path) -> Counts:
        path = folder / FILE
        if not path.exists():
            raise WorldError(f"world: {path} is not there; it is written with a world of tables")
        held = json.loads(path.read_text(encoding="utf-8"))
        return cls(tuple(held["right"]), tuple(held["wrong"]))
