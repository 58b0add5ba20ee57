"""Runs put in their places: which checkpoint, recipe and seed each is, and what is still missing.

A cell is one (trunk, checkpoint, recipe, seed) with its final evaluations. The checkpoints of the
trunks are cells too: their recipe is "base". Trunks are the runs that do nothing but pre-train.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from megarlx.evaluation.readiness import PROBE
from megarlx.report.asked_apart import asked_apart
from megarlx.report.records import runs_of_records, with_recorded
from megarlx.report.runs import (
    ACCURACY_KINDS,
    AGENT,
    Evaluation,
    ReportError,
    Run,
    find_runs,
    read_run,
)
from megarlx.report.settings import settings_hash, told_apart
from megarlx.report.style import in_order

BASE = "base"
FEW_SHOT = "_few_shot"
AVERAGED = "_average"
KS = (1, 8, 32)


@dataclass(frozen=True, eq=False)
class Cell:
    run: Run
    trunk: Run | None  # None where its folder is not among those reported
    variant: str  # what tells its trunk apart from others of the same seed; "" where nothing does
    checkpoint_tokens: int
    iteration: int  # of the run it starts from; of a trunk's checkpoint, its own
    recipe: str
    setting: str  # what tells it apart from others of the same recipe, checkpoint and seed
    seed: int
    headline: Evaluation | None
    evaluations: dict[str, Evaluation] = field(repr=False)  # the final ones, by suite

    @property
    def label(self) -> str:
        return f"{self.recipe} ({self.setting})" if self.setting else self.recipe

    @property
    def place(self) -> tuple[str, int, int]:
        """Cells of one place differ in nothing but what was done there."""
        return (self.trunk.name if self.trunk else "", self.checkpoint_tokens, self.seed)

    @property
    def accuracy_suites(self) -> list[str]:
        """Without those of the moving average, beside these: they are of other weights."""
        return sorted(
            suite
            for suite, evaluation in self.evaluations.items()
            if evaluation.kind in ACCURACY_KINDS
            and not (suite.endswith(AVERAGED) and suite.removesuffix(AVERAGED) in self.evaluations)
        )

    @property
    def capability(self) -> float | None:
        """The mean accuracy over its suites, as a share."""
        return self.accuracy(self.accuracy_suites)

    def accuracy(self, suites: Collection[str]) -> float | None:
        found = [self.evaluations[suite].metrics["accuracy"] for suite in suites]
        return sum(found) / len(found) if found else None

    @property
    def cost(self) -> dict[str, float]:
        if self.recipe != BASE:
            return self.run.cost()
        return self.run.cost(next((e.iteration for e in self.evaluations.values()), None))


def _after(trunk: Run | None) -> str:
    """What told pre-training that goes on from where it goes on from."""
    return f"after {trunk.recipe or 'pre-training'}" if trunk and trunk.parent else ""


def _joined(*parts: str) -> str:
    return ", ".join(filter(None, parts))


class Study:
    def __init__(self, root: Path, runs: list[Run], problems: Iterable[str] = ()) -> None:
        self.root, self.runs, self.problems = root, runs, list(problems)

    @staticmethod
    def of(root: Path, records: Path | None = None) -> Study:
        """The runs below a folder, and those elsewhere that they started from; and what records,
        below it or in a folder of their own, tell of runs that are not there."""
        study = Study(root, *find_runs(root))
        while elsewhere := study._ancestors_elsewhere():
            found = [read_run(path, root, study.problems) for path in elsewhere]
            if not (read := [run for run in found if run is not None]):
                break
            study = Study(root, [*study.runs, *read], study.problems)
        for folder in (root, records):
            recorded = [] if folder is None else runs_of_records(folder, study.problems)
            study = Study(root, with_recorded(study.runs, recorded), study.problems)
        if not study.runs:
            detail = "".join(f"\n  {problem}" for problem in study.problems)
            raise ReportError(f"{root} holds no run: no lineage.json in it or below it{detail}")
        return study

    @property
    def trunks(self) -> list[Run]:
        """Pre-training, also where it goes on from a run that is one or was converted."""
        return [run for run in self.runs if run.is_trunk]

    @property
    def excursions(self) -> list[Run]:
        return [run for run in self.runs if not run.is_trunk]

    def parent_of(self, run: Run) -> Run | None:
        """The run it started from, if it is here."""
        return self._parents[run.name]

    @cached_property
    def _parents(self) -> dict[str, Run | None]:
        here = {os.path.realpath(run.path): run for run in self.runs}
        return {run.name: self._find_parent(run, here) for run in self.runs}

    def _find_parent(self, run: Run, here: dict[str, Run]) -> Run | None:
        """Paths may be relative, or from before the sweep was moved."""
        if run.parent is None:
            return None
        given = Path(run.parent.run)
        for path in self._may_lie_at(run, given):
            found = here.get(os.path.realpath(path))
            if found is not None and found is not run:
                return found
        moved = [
            other
            for other in self.runs
            if other is not run and f"/{given.as_posix()}".endswith(f"/{other.name}")
        ]
        return max(moved, key=lambda other: len(other.name), default=None)

    def _may_lie_at(self, run: Run, given: Path) -> list[Path]:
        return [base / given for base in (run.path, run.path.parent, self.root, Path.cwd())]

    def _ancestors_elsewhere(self) -> list[Path]:
        """Folders outside of this one that hold the parents of runs in it."""
        found: dict[str, Path] = {}
        for run in self.runs:
            if self.parent_of(run) is None and run.parent is not None:
                for path in self._may_lie_at(run, Path(run.parent.run)):
                    if (path / "lineage.json").exists():
                        found.setdefault(os.path.realpath(path), path)
                        break
        return list(found.values())

    def line_of(self, run: Run) -> list[Run]:
        """The run, its parent and so on, as far as they are here."""
        line = [run]
        while (above := self.parent_of(line[-1])) is not None:
            if above in line:
                raise ReportError(f"{run.name} is its own ancestor; see its lineage.json")
            line.append(above)
        return line

    def trunk_of(self, run: Run) -> Run | None:
        return next((one for one in self.line_of(run) if one.is_trunk), None)

    def recipe_of(self, run: Run) -> str:
        """Its recipe, after those of the excursions that it starts from: "sft + rl"."""
        parent = self.parent_of(run)
        own = run.recipe or ("continued" if run.parent else BASE)
        if parent is None or parent.is_trunk:
            return own
        return f"{self.recipe_of(parent)} + {own}"

    @cached_property
    def headline(self) -> str | None:
        """The pass@k suite that most excursions have; of equals the first by name."""
        counts: Counter[str] = Counter()
        for run in self.runs:
            for suite in {e.suite for e in run.evaluations if e.kind == "pass_at_k"}:
                if not suite.endswith((FEW_SHOT, PROBE)):
                    counts[suite] += 1 if run.is_trunk else len(self.runs)
        return min(counts, key=lambda suite: (-counts[suite], suite), default=None)

    def capability(self, cell: Cell) -> float | None:
        """Over the suites that all of its checkpoint were measured by, and alike: means over other
        suites are no more or less than one another."""
        if not cell.accuracy_suites:
            return None
        return cell.accuracy(self._shared_suites.get((cell.variant, cell.checkpoint_tokens), ()))

    @cached_property
    def _shared_suites(self) -> dict[tuple[str, int], list[str]]:
        together: dict[tuple[str, int], list[Cell]] = defaultdict(list)
        for cell in self.cells:
            if cell.accuracy_suites:
                together[cell.variant, cell.checkpoint_tokens].append(cell)
        return {
            place: [
                suite
                for suite in cells[0].accuracy_suites
                if all(suite in cell.accuracy_suites for cell in cells)
                and all(
                    cell.evaluations[suite].asked_like(cells[0].evaluations[suite])
                    for cell in cells
                )
            ]
            for place, cells in together.items()
        }

    @cached_property
    def agent_suites(self) -> list[str]:
        """One for each environment that some run was tested in."""
        found = (e for run in self.runs for e in run.evaluations if e.kind == AGENT)
        return sorted({e.suite for e in found if not e.suite.endswith(PROBE)})

    @cached_property
    def cells(self) -> list[Cell]:
        found = [*self._base_cells(), *self._excursion_cells()]
        order = in_order({cell.label for cell in found})
        return sorted(
            found, key=lambda c: (c.variant, c.checkpoint_tokens, order.index(c.label), c.seed)
        )

    @cached_property
    def _variants(self) -> dict[str, str]:
        """Of each trunk. One that goes on from another is of its variant."""
        first = {trunk.name: self.line_of(trunk)[-1] for trunk in self.trunks}
        told = told_apart([(run, (run.seed,)) for run in dict.fromkeys(first.values())])
        return {name: told[run.name] for name, run in first.items()}

    def _base_cells(self) -> Iterator[Cell]:
        for trunk in self.trunks:
            branched = {
                run.parent.iteration: run.parent.trunk_tokens
                for run in self.excursions
                if run.parent and self.parent_of(run) is trunk
            }
            evaluated = {
                e.iteration: e.trunk_tokens
                for e in trunk.evaluations
                if not e.suite.endswith(PROBE)
            }
            known = sorted((evaluated | branched).items())
            # Steps that are no pre-training add no tokens: of those the last stands for all, unless
            # others were branched from.
            last = {tokens: [iteration] for iteration, tokens in known}
            for tokens in branched.values():
                last[tokens] = [i for i, seen in sorted(branched.items()) if seen == tokens]
            chosen = [(tokens, i) for tokens, found in sorted(last.items()) for i in found]
            for tokens, iteration in chosen:
                several = f"step {iteration:,}" if len(last[tokens]) > 1 else ""
                final = trunk.at(iteration)
                few_shot = final.get(f"{self.headline}{FEW_SHOT}")
                yield Cell(
                    trunk,
                    trunk,
                    self._variants[trunk.name],
                    tokens,
                    iteration,
                    BASE,
                    _joined(_after(trunk), several),
                    trunk.seed,
                    few_shot or final.get(self.headline or ""),
                    final,
                )

    def _excursion_cells(self) -> Iterator[Cell]:
        trunks = {run.name: self.trunk_of(run) for run in self.excursions}
        settings: dict[str, str] = {}
        by_recipe: defaultdict[str, list[Run]] = defaultdict(list)
        for run in self.excursions:
            by_recipe[self.recipe_of(run)].append(run)
        for runs in by_recipe.values():
            keyed = [(r, (trunks[r.name], r.trunk_tokens, r.seed)) for r in runs]
            settings |= told_apart(keyed)
        for run in self.excursions:
            trunk = trunks[run.name]
            final = {}
            if run.finished:
                end = run.planned_steps or run.steps_done
                final = {e.suite: e for e in run.evaluations if e.iteration >= end}
            yield Cell(
                run,
                trunk,
                self._variants[trunk.name] if trunk else "",
                run.parent.trunk_tokens if run.parent else run.trunk_tokens,
                run.parent.iteration if run.parent else 0,
                self.recipe_of(run),
                _joined(_after(trunk), settings[run.name]),
                run.seed,
                final.get(self.headline or ""),
                final,
            )

    def base_of(self, cell: Cell) -> Cell | None:
        """What it started from: a checkpoint of a trunk, or of another excursion."""
        if cell.recipe == BASE:
            return cell
        parent = self.parent_of(cell.run)
        for other in self.cells:
            if other.run is parent and other.recipe != BASE:
                there = other.run.at(cell.iteration)
                return replace(other, headline=there.get(self.headline or ""), evaluations=there)
            if other.run is parent and other.iteration == cell.iteration:
                return other
        return None

    def trunk_at(self, cell: Cell) -> Cell | None:
        """The cell's trunk at the cell's tokens."""
        return next(
            (
                c
                for c in self.cells
                if c.recipe == BASE
                and c.trunk is cell.trunk
                and c.checkpoint_tokens == cell.checkpoint_tokens
            ),
            None,
        )

    def pairs(self, recipe: str, other: str) -> list[tuple[Cell, Cell]]:
        """Cells of two recipes at the same trunk, checkpoint and seed."""
        if other == BASE:
            return [(c, b) for c in self.of_recipe(recipe) if (b := self.base_of(c)) is not None]
        return [
            (a, b)
            for a in self.of_recipe(recipe)
            for b in self.of_recipe(other)
            if a.place == b.place
        ]

    def of_recipe(self, recipe: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.recipe == recipe]

    def readiness_of(self, cell: Cell) -> Evaluation | None:
        """The probe in its own run where RL began; else what a suite of its base says."""
        base = self.base_of(cell)
        own = [e for e in cell.run.evaluations if e.suite.endswith(PROBE)]
        others = sorted(
            base.evaluations.values() if base else (), key=lambda e: not e.suite.endswith(PROBE)
        )
        probes = [e for e in (*own, *others) if "informative_groups" in e.metrics]
        return probes[0] if probes else None

    def before_rl(self, cell: Cell, probe: Evaluation) -> Evaluation | None:
        """The headline suite where the probe was taken: of the base, or within the run."""
        if cell.headline is None:
            return None
        inside = [
            e for e in cell.run.course(cell.headline.suite) if 0 < e.iteration <= probe.iteration
        ]
        if probe.suite.endswith(PROBE) and probe in cell.run.evaluations and probe.iteration:
            return inside[-1] if inside else None
        base = self.base_of(cell)
        return base.headline if base else None

    @property
    def seeds(self) -> list[int]:
        return sorted({cell.seed for cell in self.cells})

    @property
    def checkpoints(self) -> list[int]:
        """Those from which excursions start; without excursions, those evaluated."""
        excursions = {c.checkpoint_tokens for c in self.cells if c.recipe != BASE}
        return sorted(excursions or {c.checkpoint_tokens for c in self.cells})

    @property
    def variants(self) -> list[str]:
        return sorted({cell.variant for cell in self.cells})

    @property
    def settings_hash(self) -> str:
        return settings_hash(self.runs)

    def wrong(self) -> list[str]:
        """What is there and cannot be used as it is, one line each."""
        runs = (cell.run for cell in self.cells if cell.recipe != BASE)
        return [
            *self.problems,
            *asked_apart(self.cells, self.headline),
            *(
                f"{run.name}: stands at step {run.steps_done:,} of {run.planned_steps:,}"
                for run in runs
                if not run.finished
            ),
        ]

    def missing(self) -> list[str]:
        """What a full report would need and is not there, one line each."""
        found = self.wrong()
        if self.headline is None and not self.agent_suites:
            found.append("no pass@k evaluation of any run")
        suites = sorted({s for c in self.cells if c.recipe != BASE for s in c.accuracy_suites})
        branched = set(self.checkpoints)
        for cell in self.cells:
            where = cell.run.name
            if cell.trunk is None:
                at = cell.run.parent.run if cell.run.parent else "?"
                found.append(f"{where}: the run it starts from, {at}, is not here")
            if cell.recipe == BASE:
                if cell.checkpoint_tokens not in branched:
                    continue
                where += f" at {cell.checkpoint_tokens:,} tokens"
            elif not cell.run.finished:
                continue
            lacks = [] if cell.headline or not self.headline else [self.headline]
            lacks += [suite for suite in suites if suite not in cell.evaluations]
            if lacks:
                found.append(f"{where}: no evaluation of {', '.join(lacks)}")
        return found
