"""`megarlx tree DIR`: which run came from which, with its tokens, recipe and headline metric."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from megarlx.evaluation.readiness import PROBE
from megarlx.printable import complain, printable
from megarlx.report.runs import Evaluation, ReportError, Run
from megarlx.report.settings import quantity
from megarlx.report.study import KS, Study


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="holds runs, at any depth")


def run(arguments: argparse.Namespace) -> int:
    try:
        study = Study.of(arguments.directory)
        drawn = lineage(study)
    except ReportError as error:
        complain(f"megarlx tree: {error}")
        return 1
    # Where no terminal is, a line is as long as it needs to be.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 400)
    console.print(drawn)
    for problem in study.problems:
        complain(problem)
    return 0


def lineage(study: Study) -> Tree:
    root = Tree(Text(printable(str(study.root))))
    for run in study.runs:
        if run.parent is None:
            _add(study, root, run)
    for run in study.runs:
        if study.parent_of(run) is None and run.parent is not None:
            far = Text(printable(f"{run.parent.run} (not found)"), style="dim")
            _add(study, root.add(far), run)
    return root


def _add(study: Study, above: Tree, run: Run) -> None:
    study.line_of(run)  # refuses a circle
    node = above.add(Text(printable("  ".join(filter(None, described(study, run))))))
    below = [other for other in study.runs if study.parent_of(other) is run]
    for other in sorted(below, key=lambda r: (r.trunk_tokens, r.recipe or "", r.seed, r.name)):
        _add(study, node, other)


def described(study: Study, run: Run) -> list[str]:
    begun = "converted" if run.converted else "pre-training"
    recipe = run.recipe or (begun if run.parent is None else "continued")
    recipe += f" of {', '.join(part.run for part in run.parts)}" if run.parts else ""
    start = f"from {quantity(run.parent.trunk_tokens)} tokens" if run.parent else ""
    evaluation = run.last(f"{study.headline}_few_shot") if run.is_trunk else None
    evaluation = evaluation or run.last(study.headline or "")
    reached = ""
    if run.is_trunk and run.evaluations:
        reached = f"{quantity(max(e.trunk_tokens for e in run.evaluations))} tokens"
    steps = "" if run.finished else f"step {run.steps_done:,} of {run.planned_steps:,}"
    success = _success_of(study, run)
    metric = success if success and evaluation is None else metric_of(evaluation)
    if evaluation is None and not success and (suites := _other_suites(run)):
        metric = f"measured by {suites}" + (f", not by {study.headline}" if study.headline else "")
    return [run.name, recipe, f"seed {run.seed}", start, reached, steps, metric]


def _other_suites(run: Run) -> str:
    return ", ".join(sorted({e.suite for e in run.evaluations if not e.suite.endswith(PROBE)}))


def _success_of(study: Study, run: Run) -> str:
    found = [e for suite in study.agent_suites if (e := run.last(suite)) is not None]
    solved = ", ".join(f"{e.suite} {100 * e.metrics['success']:.1f}%" for e in found)
    return solved and f"{solved} at step {max(e.iteration for e in found):,}"


def metric_of(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return "not evaluated"
    found = [(k, evaluation.metrics.get(f"pass_at_{k}")) for k in KS]
    known = [(k, value) for k, value in found if value is not None]
    if not known:
        return ""
    ks = "/".join(str(k) for k, _ in known)
    values = "/".join(f"{100 * value:.1f}" for _, value in known)
    return f"{evaluation.suite} pass@{ks} {values}% at step {evaluation.iteration:,}"
