"""pass@k, gains, capability against pre-training tokens; with one checkpoint a row for each recipe.

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
    height_of_rows,
    legend,
    one_scale,
    panels,
    tokens_axis,
    with_interval,
)
from megarlx.report.runs import ACCURACY_KINDS
from megarlx.report.settings import quantity
from megarlx.report.study import BASE, KS, Cell, Study
from megarlx.report.style import COLUMNS, GREY, in_order, look_of

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
        one_scale_of_values=True,
    )


def gains(study: Study, variant: str) -> Figure | None:
    """Of every recipe over where it starts from, and of SFT→RL over the SFT beside it."""
    recipes = dict.fromkeys(c.recipe for c in study.cells if c.recipe != BASE)
    compared = [(recipe, BASE, "") for recipe in recipes]
    compared.append(("sft_then_rl", "sft", " over SFT"))
    data: Panels = {}
    for k in KS:
        title = f"pass@{k}, points gained"
        data[title] = {}
        for recipe, other, over in compared:
            by_label: dict[str, list[Any]] = {}
            for cell, before in study.pairs(recipe, other):
                if cell.variant == variant:
                    of = of_suite(cell.headline, before.headline, f"pass_at_{k}")
                    points = by_label.setdefault(f"{cell.label}{over}", [])
                    points += [(cell.checkpoint_tokens, values) for values in of.values()]
            pooled = {label: _pooled(points) for label, points in by_label.items()}
            data[title] |= {label: course for label, course in pooled.items() if course}
    return _figure(
        data,
        "gains",
        "What each recipe adds",
        "Gain in percentage points over the checkpoint that a recipe starts from, and of SFT→RL "
        "over SFT, question by question on the same questions.",
        dict.fromkeys(data, 0.0),
        one_scale_of_values=True,
    )


def capability(study: Study, variant: str) -> Figure | None:
    cells = _cells(study, variant)
    suites = sorted({s for c in cells for s in c.accuracy_suites})
    data: Panels = {}
    if len(suites) > 1:
        data[f"mean of the {len(suites)} suites, %"] = _means(cells, suites)
    data |= {f"{suite}, accuracy in %": _courses(cells, _accuracy(suite)) for suite in suites}
    return _figure(
        data,
        "capability",
        "General capability against pre-training tokens",
        "Accuracy of each suite of multiple choice and cloze tests, at the end of each recipe. "
        "General capability is their mean; its band is the range over seeds.",
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
    digits: int = 1,
    one_scale_of_values: bool = False,
) -> Figure | None:
    data = {panel: courses for panel, courses in data.items() if any(courses.values())}
    if not data:
        return None
    labels = in_order({label for courses in data.values() for label in courses})
    ticks = sorted({x for courses in data.values() for c in courses.values() for x in c})
    one = len(ticks) == 1

    def draw(wide: bool) -> Any:
        height = height_of_rows(labels) + 0.6 if one else 2.5
        canvas, axes = panels(list(data), height, wide=wide)
        for number, (ax, (panel, courses)) in enumerate(zip(axes, data.items(), strict=True)):
            ordered = {label: courses[label] for label in labels if courses.get(label)}
            if one:
                every = ordered.keys() == data[next(iter(data))].keys()
                named = not wide or number % COLUMNS == 0 or not every
                dots = {k: c[ticks[0]] for k, c in ordered.items()}
                draw_dots(ax, dots, labels, digits, names_shown=named)
            else:
                draw_courses(ax, ordered, labels, beside=True)
            if panel in floors:
                line = ax.axvline if one else ax.axhline
                line(floors[panel], color=GREY, linestyle=(0, (1, 2)), linewidth=1.3, zorder=0)
        if one_scale_of_values:
            one_scale(axes, x=one, y=not one)
        if not one:
            tokens_axis(axes, ticks)
        extra: list[Any] = []
        if any(panel in floors for panel in data):
            label = "guessing" if any(floors.values()) else "no change"
            extra.append(Line2D([], [], color=GREY, linestyle=(0, (1, 2)), label=label))
        legend(canvas, [] if one else labels, extra)
        return canvas

    note = f"All start from one checkpoint, at {quantity(ticks[0])} tokens." if one else ""
    names = ", ".join(look_of(label, labels).name for label in labels)
    alt = f"{title}: {'; '.join(data)}; for {names}. The numbers are in the table."
    return Figure(name, title, caption, alt, _table(data, labels, ticks, digits), draw, note)


def _table(data: Panels, labels: list[str], ticks: list[float], digits: int) -> Table:
    rows = [["from tokens", "recipe", *data]]
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


def _means(cells: list[Cell], suites: list[str]) -> dict[str, Course]:
    """Of the cells that were measured by all of these suites."""
    found: dict[str, dict[float, list[float]]] = {}
    for cell in cells:
        if cell.capability is not None and cell.accuracy_suites == suites:
            by_tokens = found.setdefault(cell.label, {})
            by_tokens.setdefault(cell.checkpoint_tokens, []).append(100 * cell.capability)
    return _with_ranges(found)


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
    return _with_ranges(found)


def _with_ranges(values: dict[str, dict[float, list[float]]]) -> dict[str, Course]:
    """The mean over seeds, from the lowest to the highest."""
    return {
        label: {t: Interval(sum(v) / len(v), min(v), max(v), 0) for t, v in by_tokens.items()}
        for label, by_tokens in values.items()
    }
