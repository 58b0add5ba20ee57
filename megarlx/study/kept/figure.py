"""pass@1 over late steps with t-bands; and what is known of facts that only early RL saw."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megarlx.report.style import PARAMETERS
from megarlx.study.kept.arms import LATE_STEPS
from megarlx.study.kept.table import Table, transfer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = {
    "": "late RL only",
    "vector-rl": "RL's vector",
    "vector-mark": "mark-only vector",
    "vector-partner": "partner's vector",
}
SHOWN = ("trunk, middle", "RL in the middle", "transplant", "through", "mark-only vector")
CHANCE = 100 / 12


def draw(table: Table, path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(PARAMETERS):
        canvas = Figure(figsize=(9.6, 3.6), layout="constrained")
        left, right = canvas.subplots(1, 2)
        for start, name in LINES.items():
            found = table.over_trunks(start)
            steps = [*found]
            if not steps:
                continue
            places = range(len(steps))
            (line,) = left.plot(
                places, [i.estimate for i in found.values()], marker="o", label=name
            )
            lows, highs = ([getattr(i, side) for i in found.values()] for side in ("low", "high"))
            if min(i.trunks for i in found.values()) > 1:
                left.fill_between(places, lows, highs, color=line.get_color(), alpha=0.15, lw=0)
        every = (0, *LATE_STEPS)
        left.set_xticks(range(len(every)), [str(k) for k in every])
        left.set_xlabel("late steps of RL")
        left.set_ylabel("pass@1, %")
        left.legend(frameon=False)
        _known(right, table)
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(path, dpi=150)


def _known(ax: Axes, table: Table) -> None:
    found = transfer(table.trunks)
    shown = [name for name in SHOWN if found is not None and name in found.known]
    for place, name in enumerate(shown):
        assert found is not None
        over = found.known[name]
        error = (
            None if over.trunks < 2 else [[over.estimate - over.low], [over.high - over.estimate]]
        )
        ax.bar(place, over.estimate, width=0.6, yerr=error, capsize=3, color="#7f9fbf")
    ax.axhline(CHANCE, color="#888888", lw=1, ls="--")
    ax.set_xticks(range(len(shown)), [name.replace(" ", "\n", 1) for name in shown])
    ax.set_ylabel("P of facts that only early RL saw, %")
