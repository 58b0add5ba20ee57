"""What the figures are made of: panels, courses with bands, rows of dots, one legend.

A figure is drawn twice: wide, its panels in rows, and narrow, for a phone, one below the other.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter

from megarlx.data.token_files import write_atomically
from megarlx.evaluation.bootstrap import Interval
from megarlx.report.settings import quantity
from megarlx.report.student import TrunkInterval
from megarlx.report.style import (
    COLUMNS,
    DARK,
    ONE_PANEL_INCHES,
    WIDE_INCHES,
    WIDTH_INCHES,
    look_of,
)

Table = list[list[str]]  # the first row is the head
Course = Mapping[float, Interval]  # x -> y
NAME_LETTERS = 24  # of a line of a name, beside a row or in a legend


@dataclass(frozen=True)
class Figure:
    """What is drawn, with all that the page says about it."""

    name: str  # of its files
    title: str
    caption: str
    alt: str
    table: Table
    draw: Callable[[bool], Canvas] | None  # wide or not; None: the table says it all
    note: str = ""  # of this one, where there is one for each kind of trunk

    @cached_property
    def wide(self) -> Canvas:
        return self._drawn(True)

    @cached_property
    def narrow(self) -> Canvas:
        return self._drawn(False)

    def _drawn(self, wide: bool) -> Canvas:
        assert self.draw is not None
        return self.draw(wide)


def panels(
    titles: Sequence[str], height: float | Sequence[float], *, wide: bool
) -> tuple[Canvas, list[Axes]]:
    """Up to three beside one another, or, of a narrow figure, all below one another. `height` in
    inches, of each or of all."""
    heights = [height] * len(titles) if isinstance(height, int | float) else list(height)
    columns = min(len(titles), COLUMNS) if wide else 1
    rows = [max(heights[at : at + columns]) for at in range(0, len(titles), columns)]
    width = WIDTH_INCHES if not wide else WIDE_INCHES if columns > 1 else ONE_PANEL_INCHES
    canvas = Canvas(figsize=(width, sum(rows) + 0.35 * len(rows) + 0.15), layout="constrained")
    FigureCanvasAgg(canvas)
    grid = canvas.subplots(len(rows), columns, squeeze=False, height_ratios=rows).flatten()
    for ax in grid[len(titles) :]:
        ax.remove()
    axes = list(grid[: len(titles)])
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(fill(title, 40 if columns > 1 else 48))
    return canvas, axes


def one_scale(axes: Sequence[Axes], *, x: bool = False, y: bool = False) -> None:
    """The same limits for all panels, so that they can be compared."""
    for wanted, get, put in ((x, Axes.get_xlim, Axes.set_xlim), (y, Axes.get_ylim, Axes.set_ylim)):
        if wanted:
            limits = [get(ax) for ax in axes]
            for ax in axes:
                put(ax, min(low for low, _ in limits), max(high for _, high in limits))


def tokens_axis(axes: Sequence[Axes], ticks: Sequence[float]) -> None:
    span = max(ticks) - min(ticks)
    shown: list[float] = []
    for tick in sorted(ticks):
        if not shown or tick - shown[-1] > span / 6:
            shown.append(tick)
    for ax in axes:
        ax.set_xlabel("pre-training tokens")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: quantity(x)))
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
    ax: Axes,
    values: Mapping[str, Interval],
    labels: Sequence[str],
    digits: int = 1,
    *,
    names_shown: bool = True,
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
    written = [fill(look_of(n, labels).name, NAME_LETTERS) if names_shown else "" for n in names]
    ax.set_yticks(range(len(names)), written)
    ax.set_ylim(len(names) - 0.5, -0.75)
    ax.grid(axis="y", visible=False)


def height_of_rows(labels: Sequence[str]) -> float:
    """In inches, of dots with the names of these beside them."""
    return len(labels) * max(0.36, 0.17 * _lines(look_of(label, labels).name for label in labels))


def _lines(names: Iterable[str]) -> int:
    return max((fill(name, NAME_LETTERS).count("\n") + 1 for name in names), default=1)


def legend(canvas: Canvas, labels: Sequence[str], extra: Sequence[Any] = ()) -> None:
    """One for all panels, below them."""
    from matplotlib.lines import Line2D

    looks = [look_of(label, labels) for label in labels]
    lines = [
        Line2D(
            *([], []),
            color=x.color,
            marker=x.marker,
            linestyle=x.dashes,
            label=fill(x.name, NAME_LETTERS),
        )
        for x in looks
    ]
    handles = [*lines, *extra]
    if not handles:
        return
    width, height = canvas.get_size_inches()
    longest = max((len(x.name) for x in looks), default=0)
    each = 2.4 if longest > 18 else 1.9 if longest > 12 else 1.45  # inches of an entry
    columns = max(1, min(len(handles), int(width / each)))
    rows = -(-len(handles) // columns)
    entry = 0.06 + 0.16 * _lines(x.name for x in looks)
    canvas.set_size_inches(width, height + entry * rows)
    canvas.legend(handles=handles, loc="outside lower center", ncols=columns)


def save(figure: Figure, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    figure.wide.savefig(folder / f"{figure.name}.png", dpi=200, facecolor="white")
    for canvas, name in ((figure.wide, figure.name), (figure.narrow, f"{figure.name}-narrow")):
        drawn = io.StringIO()
        canvas.savefig(drawn, format="svg", metadata={"Date": None})
        write_atomically(folder / f"{name}.svg", in_the_dark(drawn.getvalue()), sync=False)


def in_the_dark(svg: str) -> str:
    """With the colours that it has where the reader's screen is dark."""
    rules = "".join(
        f'[style*="{kind}: {light}"] {{ {kind}: {dark} !important }} '
        for light, dark in DARK.items()
        for kind in ("fill", "stroke")
    )
    style = f"<style>@media (prefers-color-scheme: dark) {{ {rules}}}</style>"
    return svg.replace("<defs>", f"{style}<defs>", 1)


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
