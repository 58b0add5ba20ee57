"""pass@k, gains, capability: against pre-training tokens, or in rows where there is one checkpoint.

Each function draws one figure of one variant of the trunks, or returns None where the runs hold
nothing to draw. Seeds are pooled; bands and bars are 95% intervals over questions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from matplotlib.lines import Line2D

from megarlx.evaluation.bootstrap import Interval, Values, interval_of_mean
from megarlx.report.comparison import of_suite
from megarlx.report.drawing import (
    Course,
    Figure,
    Table,
    draw_courses,
    draw_dots,
    legend,
    panels,
    tokens_axis,
    with_interval,
)
from megarlx.report.runs import ACCURACY_KINDS
from megarlx.report.settings import quantity
from megarlx.report.study import BASE, KS, Cell, Study
from megarlx.report.style import GREY, in_order, look_of

Panels = dict[str, dict[str, Course]]  # title -> recipe -> tokens -> value
Read = Callable[[Cell], Values | None]


def pass_at_k(study: Study, variant: str) -> Figure | None:
    cells = _cells(study, variant)
    data: Panels = {}
    guessing: dict[str, float] = {}
    for k in KS:
        reached = guessing_of(cells, k)
        beside = "" if reached is None else f" (guessing {reached:.1f})"
        title = f"pass@{k}, %{beside}"
        data[title] = _courses(cells, _headline(f"pass_at_{k}"))
        if reached is not None:
            guessing[title] = reached
    return _figure(
        data,
        "pass_at_k",
        "pass@k against pre-training tokens",
        "Each excursion starts at a checkpoint of the trunk and is drawn at the tokens which that "
        "checkpoint has seen. Guessing draws answers from those of the other questions.",
        guessing,
    )


def gains(study: Study, variant: str) -> Figure | None:
    data: Panels = {}
    for name, recipe, other in (
        ("RL − base", "rl", BASE),
        ("SFT→RL − SFT", "sft_then_rl", "sft"),
    ):
        pairs = [(c, b) for c, b in study.pairs(recipe, other) if c.variant == variant]
        title = f"{name}, points"
        data[title] = {}
        for k in KS:
            course = _pooled(
                (cell.checkpoint_tokens, values)
                for cell, before in pairs
                for values in of_suite(cell.headline, before.headline, f"pass_at_{k}").values()
            )
            if course:
                data[title][f"pass@{k}"] = course
    return _figure(
        data,
        "gains",
        "What RL adds",
        "Gain in percentage points of RL over the checkpoint it starts from, and of SFT→RL over "
        "SFT, on the same questions.",
        dict.fromkeys(data, 0.0),
        lines_are="metric",
    )


def capability(study: Study, variant: str) -> Figure | None:
    cells = _cells(study, variant)
    suites = sorted({s for c in cells for s in c.accuracy_suites})
    data = {f"{suite}, accuracy in %": _courses(cells, _accuracy(suite)) for suite in suites}
    return _figure(
        data,
        "capability",
        "General capability",
        "Accuracy of each suite of multiple choice and cloze tests, at the end of each recipe.",
        {},
    )


def held_out(study: Study, variant: str) -> Figure | None:
    """Losses and behaviours: one number an evaluation, so the band is the range over seeds."""
    cells = _cells(study, variant)
    shown = {
        "perplexity": {"nll": "loss in nats a token"},
        "behaviour": {
            "mean": "mean reward",
            "violation_rate": "share that violates",
            "drift": "drift of the reward from its parent",
        },
    }
    found = sorted(
        {
            (e.suite, metric, shown[e.kind][metric])
            for c in cells
            for e in c.evaluations.values()
            if e.kind in shown
            for metric in e.metrics
            if metric in shown[e.kind]
        }
    )
    data: Panels = {}
    for suite, metric, name in found:
        data[f"{suite}: {name}"] = _ranges(cells, suite, metric)
    return _figure(
        data,
        "held_out",
        "Held-out loss and behaviour",
        "The mean over seeds; bands reach from the lowest to the highest seed.",
        {},
        digits=3,
    )


def _figure(
    data: Panels,
    name: str,
    title: str,
    caption: str,
    floors: Mapping[str, float],
    *,
    lines_are: str = "recipe",
    digits: int = 1,
) -> Figure | None:
    data = {panel: courses for panel, courses in data.items() if any(courses.values())}
    if not data:
        return None
    labels = in_order({label for courses in data.values() for label in courses})
    ticks = sorted({x for courses in data.values() for c in courses.values() for x in c})
    one = len(ticks) == 1
    height = 0.36 * len(labels) + 0.75 if one else 2.6
    canvas, axes = panels(list(data), height, share_x=not one)
    for ax, (panel, courses) in zip(axes, data.items(), strict=True):
        ordered = {label: courses[label] for label in labels if courses.get(label)}
        if one:
            draw_dots(ax, {k: c[ticks[0]] for k, c in ordered.items()}, labels, digits)
        else:
            draw_courses(ax, ordered, labels, beside=True)
        if panel in floors:
            line = ax.axvline if one else ax.axhline
            line(floors[panel], color=GREY, linestyle=(0, (1, 2)), linewidth=1.3, zorder=0)
    if not one:
        tokens_axis(axes[-1], ticks)
    is_guess = any(floors.values())
    extra: list[Any] = []
    if floors and any(panel in floors for panel in data):
        label = "guessing" if is_guess else "no change"
        extra.append(Line2D([], [], color=GREY, linestyle=(0, (1, 2)), label=label))
    legend(canvas, [] if one else labels, extra)
    if one:
        caption += f" One checkpoint, at {quantity(ticks[0])} tokens: drawn in rows."
    names = ", ".join(look_of(label, labels).name for label in labels)
    alt = f"{title}: {'; '.join(data)}; for {names}. The numbers are in the table."
    return Figure(name, title, caption, alt, _table(data, labels, ticks, lines_are, digits), canvas)


def _table(data: Panels, labels: list[str], ticks: list[float], what: str, digits: int) -> Table:
    rows = [["tokens", what, *data]]
    for tokens in ticks:
        for label in labels:
            values = [courses.get(label, {}).get(tokens) for courses in data.values()]
            if any(values):
                shown = [with_interval(value, digits) for value in values]
                rows.append([quantity(tokens), look_of(label, labels).name, *shown])
    return rows


def _cells(study: Study, variant: str) -> list[Cell]:
    """Of one variant of the trunks; of the trunks, the checkpoints from which excursions start."""
    here = [cell for cell in study.cells if cell.variant == variant]
    studied = {c.checkpoint_tokens for c in here if c.recipe != BASE}
    return [c for c in here if c.recipe != BASE or not studied or c.checkpoint_tokens in studied]


def _headline(metric: str) -> Read:
    return lambda cell: cell.headline.percent(metric) if cell.headline else None


def _accuracy(suite: str) -> Read:
    def read(cell: Cell) -> Values | None:
        found = cell.evaluations.get(suite)
        return found.percent("accuracy") if found and found.kind in ACCURACY_KINDS else None

    return read


def guessing_of(cells: Iterable[Cell], k: int) -> float | None:
    """The highest of these cells, in percent."""
    metric = f"pass_at_{k}"
    found = [
        c.headline.guessing[metric] for c in cells if c.headline and metric in c.headline.guessing
    ]
    return 100 * max(found) if found else None


def _courses(cells: list[Cell], read: Read) -> dict[str, Course]:
    found: dict[str, Course] = {}
    for label in {cell.label for cell in cells}:
        course = _pooled(
            (cell.checkpoint_tokens, values)
            for cell in cells
            if cell.label == label and (values := read(cell))
        )
        if course:
            found[label] = course
    return found


def _pooled(points: Any) -> dict[float, Interval]:
    """(tokens, values of questions) of several seeds -> tokens -> their mean."""
    by_tokens: dict[float, list[Values]] = {}
    for tokens, values in points:
        by_tokens.setdefault(tokens, []).append(values)
    found = {tokens: interval_of_mean(cells) for tokens, cells in by_tokens.items()}
    return {tokens: interval for tokens, interval in found.items() if interval is not None}


def _ranges(cells: list[Cell], suite: str, metric: str) -> dict[str, Course]:
    found: dict[str, dict[float, list[float]]] = {}
    for cell in cells:
        evaluation = cell.evaluations.get(suite)
        value = evaluation.metrics.get(metric) if evaluation else None
        if value is not None and math.isfinite(value):
            by_tokens = found.setdefault(cell.label, {})
            by_tokens.setdefault(cell.checkpoint_tokens, []).append(value)
    return {
        label: {t: Interval(sum(v) / len(v), min(v), max(v), 0) for t, v in by_tokens.items()}
        for label, by_tokens in found.items()
    }
