"""The runs of the kept study, by seed and by their names without it; and what each has reached.

Every number is in percentage points. A trunk's runs are paired: the same questions, one trunk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megarlx.report.runs import Evaluation, Run
from megarlx.report.study import Cell, Study

SUITE, KNOWN = "math", "withheld"  # of answers; of facts that no text tells
RATE = re.compile(r"(.+)-lr-([\d.e-]+)")
LATE_ONLY, LATE_FROM = "rl-late-at-", "rl-late-from-"
LATE_STEPS = (10, 20, 40, 80)
AFTER = (5, 10, 20, 40, 80, 160)  # steps of pre-training behind early RL


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

    seed: int
    trunk: Run
    runs: Mapping[str, Run]

    @property
    def end(self) -> int:
        return self.trunk.planned_steps or self.trunk.steps_done

    @property
    def middle(self) -> int:
        """Where the vectors' RL begins."""
        return next(
            (
                r.parent.iteration
                for n, r in self.runs.items()
                if n.startswith("rl_early") and r.parent
            ),
            0,
        )

    def rates(self, start: str) -> dict[str, Run]:
        """The late runs from a start ("" is the trunk's end), by their learning rate as written."""
        prefix = f"{LATE_FROM}{start}" if start else f"{LATE_ONLY}{self.end}"
        found = {}
        for name, run in self.runs.items():
            match = RATE.fullmatch(name)
            if match is not None and match[1] == prefix:
                found[match[2]] = run
        return found

    def early_flop(self, name: str) -> float:
        """Of the RL, or what stands for it, that the arm's vector is made of."""
        run = self.runs.get(name)
        parts = () if run is None else run.parts
        sources = (self.runs.get(stem_of(part.run, self.seed)) for part in parts)
        return sum(source.cost().get("flop", 0.0) for source in sources if source is not None)


def stem_of(name: str, seed: int) -> str:
    return Path(name).name.removesuffix(f"-seed-{seed}")


def arms_of(study: Study) -> list[Arms]:
    """Of every trunk that has any, by seed."""
    found = []
    for trunk in study.trunks:
        match = re.fullmatch(r"trunk-seed-(\d+)", Path(trunk.name).name)
        if match is None:
            continue
        seed = int(match[1])
        runs = {
            stem_of(run.name, seed): run
            for run in study.runs
            if run is not trunk and run.name.endswith(f"-seed-{seed}")
        }
        found.append(Arms(seed, trunk, runs))
    return sorted(found, key=lambda arms: arms.seed)


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


def course(run: Run) -> dict[int, float]:
    """pass@1 by late steps, where it was measured at these."""
    found = {k: point(run, k) for k in LATE_STEPS}
    return {k: reached.y for k, reached in found.items() if reached is not None}


def known(run: Run | None, iteration: int | None = None, suite: str = KNOWN) -> float | None:
    """P_K: the mean probability of the right value of kept facts."""
    if run is None:
        return None
    found = evaluation(run, last_step(run) if iteration is None else iteration, suite)
    return None if found is None else 100 * found.metrics["probability"]


def cell_of(study: Study, run: Run) -> Cell | None:
    return next((cell for cell in study.cells if cell.run is run), None)
