"""pass@1 over late steps with t-bands, in each world; and what is known of withheld facts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from megarlx.report.style import PARAMETERS
from megarlx.study.kept.facts import END, MIDDLE, RL_MIDDLE, Transfer, transfer
from megarlx.study.kept.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = {
    "": "late RL only",
    "vector-rl": "RL's vector",
    "vector-mark": "mark-only vector",
    "vector-partner": "partner's vector",
}
SHOWN = (MIDDLE, RL_MIDDLE, END, "transplant", "through", "mark-only vector")
CHANCE = 100 / 12
TITLES = {"kept": "tables", "kept_arithmetic": "arithmetic"}


def draw(tables: Mapping[str, Table], path: Path) -> None:
    """A panel for each world that has late RL, and one for facts."""
    import matplotlib
    from matplotlib.figure import Figure

    late = {world: table for world, table in tables.items() if table.late_steps}
    facts = [found for table in tables.values() if (found := transfer(table.trunks)) is not None]
    widths = [*(3.4 for _ in late), *(4.4 for _ in facts)] or [3.4]
    with matplotlib.rc_context(PARAMETERS):
        canvas = Figure(figsize=(1.0 + sum(widths), 3.6), layout="constrained")
        axes = list(canvas.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0])
        for world, table in late.items():
            _courses(axes.pop(0), table, TITLES.get(world, world))
        for found in facts:
            _known(axes.pop(0), found)
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(path, dpi=150)


def _courses(ax: Axes, table: Table, title: str) -> None:
    every = [0, *table.late_steps]
    for start, name in LINES.items():
        found = table.over_trunks(start)
        if not found:
            continue
        places = [every.index(k) for k in found]
        (line,) = ax.plot(places, [i.estimate for i in found.values()], marker="o", label=name)
        lows, highs = ([getattr(i, side) for i in found.values()] for side in ("low", "high"))
        if min(i.trunks for i in found.values()) > 1:
            ax.fill_between(places, lows, highs, color=line.get_color(), alpha=0.15, lw=0)
    ax.set_xticks(range(len(every)), [str(k) for k in every])
    ax.set_ylim(bottom=0)
    ax.set_title(title)
    ax.set_xlabel("late steps of RL")
    ax.set_ylabel("pass@1, %")
    ax.legend(frameon=False)


def _known(ax: Axes, found: Transfer) -> None:
    shown = [name for name in SHOWN if name in found.known]
    for place, name in enumerate(shown):
        over = found.known[name]
        error = (
            None if over.trunks < 2 else [[over.estimate - over.low], [over.high - over.estimate]]
        )
        ax.bar(place, over.estimate, width=0.6, yerr=error, capsize=3, color="#7f9fbf")
    ax.axhline(CHANCE, color="#888888", lw=1, ls="--", label="chance, 1/12")
    ax.legend(frameon=False)
    ax.set_xticks(range(len(shown)), [fill(name, 10) for name in shown], fontsize="small")
    ax.set_ylabel("P of facts that only early RL saw, %")
