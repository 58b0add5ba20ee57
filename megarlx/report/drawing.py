"""What the figures are made of: stacked panels, courses with bands, rows of dots, one legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter

from megarlx.evaluation.bootstrap import Interval
from megarlx.report.settings import quantity
from megarlx.report.student import TrunkInterval
from megarlx.report.style import WIDTH_INCHES, look_of

Table = list[list[str]]  # the first row is the head
Course = Mapping[float, Interval]  # x -> y


@dataclass(frozen=True)
class Figure:
    """A drawn figure with all that the page says about it."""

    name: str  # of its files
    title: str
    caption: str
    alt: str
    table: Table
    canvas: Canvas


def panels(
    titles: Sequence[str], height: float | Sequence[float], *, share_x: bool = True
) -> tuple[Canvas, list[Axes]]:
    """One below the other: side by side they could not be read on a phone. Heights in inches."""
    heights = [height] * len(titles) if isinstance(height, int | float) else list(height)
    canvas = Canvas(figsize=(WIDTH_INCHES, sum(heights) + 0.5), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots(len(titles), 1, sharex=share_x, squeeze=False, height_ratios=heights)[
        :, 0
    ]
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(fill(title, 48))
    return canvas, list(axes)


def tokens_axis(ax: Axes, ticks: Sequence[float]) -> None:
    ax.set_xlabel("pre-training tokens")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: quantity(x)))
    span = max(ticks) - min(ticks)
    shown: list[float] = []
    for tick in sorted(ticks):
        if not shown or tick - shown[-1] > span / 9:
            shown.append(tick)
    ax.set_xticks(shown)


def draw_courses(
    ax: Axes, courses: Mapping[str, Course], labels: Sequence[str], *, beside: bool = False
) -> None:
    """A line for each recipe, its interval as a band; many bands are paler.

    `beside`: points of one place on the axis stand beside one another, not on top.
    """
    strength = 0.14 if len(courses) <= 6 else 0.06
    every = [x for course in courses.values() for x in course]
    width = (max(every) - min(every)) / 80 if beside and every else 0.0
    for number, (label, course) in enumerate(courses.items()):
        look = look_of(label, labels)
        aside = width * (number - (len(courses) - 1) / 2)
        ys = [course[x].estimate for x in sorted(course)]
        xs = [x + aside for x in sorted(course)]
        ax.plot(xs, ys, color=look.color, marker=look.marker, linestyle=look.dashes)
        low, high = ([_finite(v, y) for v, y in zip(vs, ys, strict=True)] for vs in _ends(course))
        ax.fill_between(xs, low, high, color=look.color, alpha=strength, linewidth=0)


def draw_dots(
    ax: Axes, values: Mapping[str, Interval], labels: Sequence[str], digits: int = 1
) -> None:
    """A row for each recipe, where there is one checkpoint and so no course to draw."""
    names = list(values)
    for row, label in enumerate(names):
        look, interval = look_of(label, labels), values[label]
        y = interval.estimate
        ax.plot([_finite(interval.low, y), _finite(interval.high, y)], [row] * 2, color=look.color)
        ax.plot([y], [row], color=look.color, marker=look.marker, markersize=8, linestyle="none")
        ax.annotate(
            f"{y:.{digits}f}",
            (y, row),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    ax.set_yticks(range(len(names)), [fill(look_of(n, labels).name, 24) for n in names])
    ax.set_ylim(len(names) - 0.5, -0.75)
    ax.grid(axis="y", visible=False)


def legend(canvas: Canvas, labels: Sequence[str], extra: Sequence[Any] = ()) -> None:
    """One for all panels, below them."""
    from matplotlib.lines import Line2D

    looks = [look_of(label, labels) for label in labels]
    lines = [
        Line2D([], [], color=x.color, marker=x.marker, linestyle=x.dashes, label=fill(x.name, 24))
        for x in looks
    ]
    handles = [*lines, *extra]
    if not handles:
        return
    columns = 2 if any(len(x.name) > 12 for x in looks) else 3
    rows = -(-len(handles) // columns)
    width, height = canvas.get_size_inches()
    canvas.set_size_inches(width, height + 0.22 * rows)
    canvas.legend(handles=handles, loc="outside lower center", ncols=columns)


def save(figure: Figure, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    figure.canvas.savefig(folder / f"{figure.name}.png", dpi=200)
    figure.canvas.savefig(folder / f"{figure.name}.svg", metadata={"Date": None})


def with_interval(interval: Interval | TrunkInterval | None, digits: int = 1) -> str:
    if interval is None:
        return "–"
    text = f"{interval.estimate:.{digits}f}"
    if not np.isfinite(interval.low):
        return text
    return f"{text} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def _ends(course: Course) -> tuple[list[float], list[float]]:
    xs = sorted(course)
    return [course[x].low for x in xs], [course[x].high for x in xs]


def _finite(value: float, otherwise: float) -> float:
    return value if np.isfinite(value) else otherwise
