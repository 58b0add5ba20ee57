"""Runs in which pre-training goes on: what it leaves of RL, beside a trunk that had none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf

from matplotlib.figure import Figure as Canvas

from megarlx.evaluation.bootstrap import interval_of_mean
from megarlx.report.comparison import Comparison, Suites, of_capability, of_suite
from megarlx.report.drawing import (
    Course,
    Figure,
    Table,
    draw_courses,
    legend,
    one_scale,
    panels,
    tokens_axis,
    with_interval,
)
from megarlx.report.settings import quantity
from megarlx.report.student import TrunkInterval
from megarlx.report.study import BASE, Cell, Study
from megarlx.report.style import in_order, look_of

SHOWN = {"pass@1": "pass_at_1", "pass@32": "pass_at_32"}
Moments = dict[int, list[Cell]]  # tokens of pre-training -> the runs, as they were there


def placement(study: Study) -> Figure | None:
    """pass@k over the tokens of pre-training, of all runs that add to these and of their trunks."""
    cells = [c for c in study.cells if c.recipe != BASE and c.run.finished and _goes_on(c)]
    if not cells:
        return None
    runs: dict[str, list[dict[int, Cell]]] = defaultdict(list)
    for cell in cells:
        runs[cell.label].append(_moments(study, cell))
    moments = {label: _at_shared_tokens(runs[label]) for label in in_order(set(runs))}
    labels = [label for label, found in moments.items() if found]
    if not labels:
        return None
    trunks = {c.trunk.name: c for c in cells if c.trunk is not None}
    first, last = (
        min(c.checkpoint_tokens for c in cells),
        max(t for m in moments.values() for t in m),
    )
    of_trunks = {
        tokens: [b for c in trunks.values() if (b := study.trunk_at(_moved(c, tokens)))]
        for tokens in sorted({c.checkpoint_tokens for c in study.of_recipe(BASE)})
        if first <= tokens <= last
    }
    moments[BASE] = {t: bases for t, bases in of_trunks.items() if len(bases) == len(trunks)}
    order = [BASE, *labels]

    def draw(wide: bool) -> Canvas:
        canvas, axes = panels([f"{name}, %" for name in SHOWN], 2.6, wide=wide)
        for ax, metric in zip(axes, SHOWN.values(), strict=True):
            courses = {label: _course(moments[label], metric) for label in order}
            draw_courses(ax, {label: c for label, c in courses.items() if c}, order)
        one_scale(axes, x=True, y=True)
        tokens_axis(axes, sorted({float(t) for found in moments.values() for t in found}))
        legend(canvas, order)
        return canvas

    names = ", ".join(look_of(label, order).name for label in order)
    return Figure(
        "placement",
        "Where pre-training goes on",
        "Runs that add to the pre-training of their checkpoint, at the tokens that they have seen; "
        "of RL's own steps, which add none, the last is drawn. Gains are over the trunk without RL "
        "at the same tokens, with 95% t-intervals over trunks; what is left is a share of the "
        "first gain.",
        f"pass@1 and pass@32 against tokens of pre-training, of {names}. The numbers are in the "
        "table.",
        _table(study, moments, order),
        draw,
    )


def _goes_on(cell: Cell) -> bool:
    return cell.headline is not None and cell.headline.trunk_tokens > cell.checkpoint_tokens


def _moments(study: Study, cell: Cell) -> dict[int, Cell]:
    return {
        e.trunk_tokens: replace(
            _moved(cell, e.trunk_tokens), headline=e, evaluations=cell.run.at(e.iteration)
        )
        for e in cell.run.course(study.headline or "")
        if e.iteration
    }


def _moved(cell: Cell, tokens: int) -> Cell:
    return replace(cell, checkpoint_tokens=tokens)


def _at_shared_tokens(runs: Sequence[dict[int, Cell]]) -> Moments:
    """Where all runs were evaluated: the mean of fewer would be that of others."""
    shared = set.intersection(*(set(run) for run in runs))
    return {tokens: [run[tokens] for run in runs] for tokens in sorted(shared)}


def _course(moments: Moments, metric: str) -> Course:
    found = {
        float(tokens): interval_of_mean([c.headline.percent(metric) for c in cells if c.headline])
        for tokens, cells in moments.items()
    }
    return {tokens: interval for tokens, interval in found.items() if interval is not None}


def _table(study: Study, moments: dict[str, Moments], order: Sequence[str]) -> Table:
    gains = [f"Δ {name}" for name in SHOWN]
    rows = [
        [
            *("recipe", "tokens", *(f"{name}, %" for name in SHOWN)),
            *(f"{name}, points" for name in gains),
            *("left of Δ pass@1", "Δ capability, points"),
        ]
    ]
    for label in order:
        courses = [_course(moments[label], metric) for metric in SHOWN.values()]
        first: TrunkInterval | None = None  # gain
        for tokens, cells in moments[label].items():
            values = [with_interval(course.get(float(tokens))) for course in courses]
            pairs = [(c, b) for c in cells if label != BASE and (b := study.trunk_at(c))]
            if len(pairs) < len(cells):
                pairs = []
            found = [_difference(pairs, _gain_in(metric)) for metric in SHOWN.values()]
            left = "–"
            if first is not None and found[0] is not None and first.estimate > 0:
                left = f"{round(100 * found[0].estimate / first.estimate)}%"
            first = first or found[0]
            row = [look_of(label, order).name, quantity(tokens), *values]
            row += [with_interval(gain) for gain in found]
            rows.append([*row, left, with_interval(_difference(pairs, of_capability))])
    return rows


def _gain_in(metric: str) -> Callable[[Cell, Cell], Suites]:
    return lambda cell, base: of_suite(cell.headline, base.headline, metric)


def _difference(
    pairs: Sequence[tuple[Cell, Cell]], of: Callable[[Cell, Cell], Suites]
) -> TrunkInterval | None:
    made = Comparison("", -inf, inf)
    for cell, base in pairs:
        made.add(cell, of(cell, base))
    return made.over_trunks()
