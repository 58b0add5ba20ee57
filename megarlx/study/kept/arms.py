"""The runs of the kept study, by world, seed and their names without it; and what each has reached.

Every number is in percentage points. A trunk's runs are paired: the same questions, one trunk.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarlx.report.runs import Evaluation, Run
from megarlx.report.study import Cell, Study

SUITE = "math"  # of answers
# Of facts that no text tells, of those that text tells wrongly, of what stands beside the former.
WITHHELD, TOLD_WRONGLY, BESIDE = "withheld", "told_wrongly", "beside"
SEED = re.compile(r"(.+)-seed-(\d+)")
RATE = re.compile(r"rl-late-(?:at-(?P<at>.+)|from-(?P<start>.+))-lr-(?P<rate>[\d.e-]+)")
AT = "-at-"
RL_VECTOR = "vector-rl"
AFTER = (5, 10, 20, 40, 80, 160)  # steps of pre-training behind early RL
OWN_SAMPLES = ("sft-marked", "sft-verified")  # recipes that read what rl-own has sampled


@dataclass(frozen=True)
class Point:
    """A run at a step: m and a of its answers, pass@k, general capability."""

    m: float | None
    a: float | None
    y: float
    y8: float | None
    y32: float | None
    capability: float | None


@dataclass(frozen=True)
class Arms:
    """Of one trunk. `middle` and `end` are its steps."""

    world: str
    seed: int
    trunk: Run
    runs: Mapping[str, Run]

    @property
    def end(self) -> int:
        """Where vectors are put."""
        put = self.runs.get(RL_VECTOR)
        if put is not None and put.parent is not None:
            return put.parent.iteration
        return self.trunk.planned_steps or self.trunk.steps_done

    @property
    def middle(self) -> int:
        """Where the RL begins of which RL's vector is made."""
        made = (r for n, r in self.runs.items() if n.startswith(RL_VECTOR) and r.parts)
        sources = [self.named(part.run) for run in made for part in run.parts]
        through = [run for name, run in self.runs.items() if name.startswith("rl_early")]
        begun = (run.parent for run in (*sources, *through) if run is not None)
        return next((parent.iteration for parent in begun if parent is not None), 0)

    def named(self, path: str) -> Run | None:
        return self.runs.get(stem_of(path, self.seed))

    def of(self, recipe: str, at: int) -> Run | None:
        """That starts from a checkpoint of the trunk, however its name writes this."""
        for name, run in self.runs.items():
            if name.rpartition(AT)[0] == recipe and run.parent and run.parent.iteration == at:
                return run
        return None

    def others_of_the_middle(self, but: Sequence[str]) -> dict[str, Run]:
        """Excursions of other recipes from where the RL begins."""
        found = {}
        for name, run in self.runs.items():
            if run.parent is None or run.parts or name.rpartition(AT)[0] in but:
                continue
            own = Path(run.parent.run).name == Path(self.trunk.name).name
            if own and run.parent.iteration == self.middle:
                found[name] = run
        return found

    def start(self, name: str) -> Run | None:
        """What late RL starts from: a transplant, or a run from the trunk's end."""
        return self.runs.get(name) or self.of(name, self.end)

    def rates(self, start: str) -> dict[str, Run]:
        """The late runs from a start ("" is the trunk's end), by their learning rate as written."""
        found = {}
        for name, run in self.runs.items():
            match = RATE.fullmatch(name)
            if match is None or (match["start"] or "").partition(AT)[0] != start:
                continue
            if start or (run.parent is not None and run.parent.iteration == self.end):
                found[match["rate"]] = run
        return found

    @property
    def late(self) -> list[Run]:
        return [run for name, run in self.runs.items() if RATE.fullmatch(name)]

    # What an arm has cost beside its trunk.

    def flop(self, run: Run, step: int | None = None) -> tuple[float, float]:
        """Early and late: of all runs that it needs, by whether they start before the trunk's end.

        Of RL that is followed by the rest of pre-training what the trunk has too does not count.
        """
        early = late = 0.0
        for one, until in self._needed(run, step):
            spent, begun = _flop(one, until), self._begun(one)
            if begun >= self.end:
                late += spent
            elif rl_steps(one) is None:
                early += spent
            else:
                early += spent - (_flop(self.trunk, self.end) - _flop(self.trunk, begun))
        return early, late

    def _needed(self, run: Run, step: int | None) -> Iterator[tuple[Run, int | None]]:
        if run is self.trunk:
            return
        yield run, step
        above = None if run.parent is None else self.named(run.parent.run)
        if above is not None and run.parent is not None:
            yield from self._needed(above, run.parent.iteration)
        sources = [self.named(part.run) for part in run.parts]
        if run.parent and stem_of(run.name, self.seed).rpartition(AT)[0] in OWN_SAMPLES:
            sources.append(self.of("rl-own", run.parent.iteration))
        for source in sources:
            if source is not None:
                yield from self._needed(source, None)

    def _begun(self, run: Run) -> int:
        """At which of the trunk's steps."""
        if run.parent is None:
            return 0
        above = self.named(run.parent.run)
        if above is None or above is self.trunk:
            return run.parent.iteration
        return self._begun(above)


def _flop(run: Run, until: int | None) -> float:
    return run.cost(until).get("flop", 0.0)


def rl_steps(run: Run | None) -> int | None:
    """Of a run that is RL first and then something else."""
    stages: Sequence[Mapping[str, Any]] = (run and run.settings.get("stages")) or ()
    if len(stages) < 2 or "rl" not in stages[0].get("objectives", {}):
        return None
    return int(stages[0]["steps"])


def late_steps(trunks: Sequence[Arms]) -> list[int]:
    """Numbers of late steps at which something was measured."""
    late = (run for arms in trunks for run in arms.late)
    return sorted({e.iteration for run in late for e in run.evaluations if e.iteration})


def stem_of(name: str, seed: int) -> str:
    return Path(name).name.removesuffix(f"-seed-{seed}")


def worlds_of(study: Study) -> dict[str, list[Arms]]:
    """Of every trunk that has any, by seed: a world is a folder of excursions."""
    groups: defaultdict[tuple[str, int], dict[str, Run]] = defaultdict(dict)
    for run in study.runs:
        match = SEED.fullmatch(Path(run.name).name)
        if match is not None:
            groups[Path(run.name).parent.as_posix(), int(match[2])][match[1]] = run
    found: dict[str, list[Arms]] = {}
    for (folder, seed), runs in sorted(groups.items()):
        # A partner is a trunk too, of which few runs are.
        above = Counter(study.line_of(run)[-1].name for run in runs.values() if not run.is_trunk)
        if not above:
            continue
        trunk = max(above, key=lambda name: (above[name], "trunk" in name))
        world = (study.root.resolve() / folder).name
        own = next(run for run in study.runs if run.name == trunk)
        found.setdefault(world, []).append(Arms(world, seed, own, runs))
    return found


def evaluation(run: Run | None, iteration: int, suite: str = SUITE) -> Evaluation | None:
    return None if run is None else run.at(iteration).get(suite)


def last_step(run: Run) -> int:
    return max((e.iteration for e in run.evaluations), default=0)


def point(run: Run | None, iteration: int | None = None) -> Point | None:
    """At a step; None: at the last that was measured."""
    if run is None:
        return None
    there = run.at(last_step(run) if iteration is None else iteration)
    if SUITE not in there:
        return None
    metrics = there[SUITE].metrics
    accuracies = [e.metrics["accuracy"] for e in there.values() if "accuracy" in e.metrics]

    def points(name: str) -> float | None:
        value = metrics.get(name)
        return None if value is None else 100 * value

    capability = 100 * sum(accuracies) / len(accuracies) if accuracies else None
    y = points("pass_at_1")
    if y is None:
        return None
    return Point(
        points("marked"),
        points("right_of_marked"),
        y,
        points("pass_at_8"),
        points("pass_at_32"),
        capability,
    )


def known(run: Run | None, suite: str, iteration: int | None = None) -> float | None:
    """The mean probability of the right value of facts: P_K, of those that are withheld."""
    if run is None:
        return None
    found = evaluation(run, last_step(run) if iteration is None else iteration, suite)
    return None if found is None else 100 * found.metrics["probability"]


def cell_of(study: Study, run: Run) -> Cell | None:
    return next((cell for cell in study.cells if cell.run is run), None)
