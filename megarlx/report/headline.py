"""The report's first sentence: what came out, with its number."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megarlx.evaluation.bootstrap import Interval, Values, interval_of_mean
from megarlx.report.comparison import of_suite
from megarlx.report.settings import quantity
from megarlx.report.study import BASE, KS, Cell, Study
from megarlx.report.style import name_of

Gains = dict[str, Interval]  # recipe -> points


def said(study: Study) -> str:
    """Of the latest checkpoint that recipes start from: which gains most, and from where to where.
    Without recipes, where pre-training has come."""
    for tokens in reversed(study.checkpoints):
        starts = [c for c in study.cells if c.recipe != BASE and c.checkpoint_tokens == tokens]
        made = _of_questions(study, starts, tokens) or _of_tasks(study, starts, tokens)
        if made:
            return made
    return _of_trunks(study)


def _of_questions(study: Study, cells: Sequence[Cell], tokens: int) -> str:
    gains = {k: _gains(study, cells, k) for k in KS}
    if not gains[1]:
        return ""
    best = _best(gains[1])
    before, after = (_mean(values) for values in _values(study, cells, best, "pass_at_1"))
    most = f", the most of {len(gains[1])} recipes" if len(gains[1]) > 1 else ""
    start = f"From {quantity(tokens)} tokens of pre-training" if tokens else "From its checkpoint"
    text = (
        f"{start}, {name_of(best)} takes pass@1 of {study.headline} from {before:.1f}% to "
        f"{after:.1f}%: {_points(gains[1][best])}{most}."
    )
    widest = max((k for k in KS if gains[k]), default=1)
    if widest > 1:
        wide = _best(gains[widest])
        same = "it gains" if wide == best else f"{name_of(wide)} gains most,"
        text += f" At pass@{widest} {same} {_points(gains[widest][wide])}."
    return text


def _gains(study: Study, cells: Sequence[Cell], k: int) -> Gains:
    found: Gains = {}
    for label in dict.fromkeys(cell.label for cell in cells):
        change: list[Values] = []
        for cell in cells:
            base = study.base_of(cell)
            if cell.label == label and base is not None:
                change += of_suite(cell.headline, base.headline, f"pass_at_{k}").values()
        interval = interval_of_mean(change)
        if interval is not None:
            found[label] = interval
    return found


def _best(gains: Gains) -> str:
    return max(gains, key=lambda label: gains[label].estimate)


def _values(
    study: Study, cells: Sequence[Cell], label: str, metric: str
) -> tuple[list[float], list[float]]:
    """Means before and after, of the cells that have both."""
    pairs = [
        (base.headline.percent(metric), cell.headline.percent(metric))
        for cell in cells
        if cell.label == label and (base := study.base_of(cell))
        if cell.headline and base.headline and base.headline.asked_like(cell.headline)
    ]
    return [_mean([*b.values()]) for b, _ in pairs], [_mean([*a.values()]) for _, a in pairs]


def _of_tasks(study: Study, cells: Sequence[Cell], tokens: int) -> str:
    for suite in study.agent_suites:
        found: Gains = {}
        for label in dict.fromkeys(cell.label for cell in cells):
            solved = [
                e.percent("success")
                for cell in cells
                if cell.label == label and (e := cell.evaluations.get(suite))
            ]
            if (interval := interval_of_mean(solved)) is not None:
                found[label] = interval
        if found:
            best = _best(found)
            most = f", the most of {len(found)} recipes" if len(found) > 1 else ""
            return (
                f"{name_of(best)} solves {found[best].estimate:.1f}% of the held-out tasks of "
                f"{suite}{_around(found[best])}{most}."
            )
    return ""


def _of_trunks(study: Study) -> str:
    bases = [c for c in study.cells if c.recipe == BASE and c.headline is not None]
    if bases:
        last = max(c.checkpoint_tokens for c in bases)
        there = [c.headline for c in bases if c.checkpoint_tokens == last]
        reached = interval_of_mean([e.percent("pass_at_1") for e in there if e])
        if reached is not None:
            return (
                f"After {quantity(last)} tokens of pre-training, pass@1 of {study.headline} is "
                f"{reached.estimate:.1f}%{_around(reached)}."
            )
    losses = [
        (run, line["loss/pretraining"])
        for run in study.trunks
        for line in run.metrics
        if math.isfinite(line.get("loss/pretraining", math.nan))
    ]
    if not losses:
        return ""
    run, loss = losses[-1]
    return f"{run.name} has reached a loss of {loss:.3f} nats a token; nothing is evaluated yet."


def _points(interval: Interval) -> str:
    nothing = interval.low <= 0 <= interval.high
    return (
        f"{interval.estimate:+.1f} points{_around(interval, '+.1f')}"
        f"{' (perhaps nothing: the interval covers 0)' if nothing else ''}"
    )


def _around(interval: Interval, form: str = ".1f") -> str:
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return ""
    return f" [{interval.low:{form}}, {interval.high:{form}}]"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
