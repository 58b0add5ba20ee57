"""What happens to single questions, and what it costs; readiness beside the gain."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from megarlx.evaluation.bootstrap import Interval, interval_of_mean
from megarlx.evaluation.consistency import Transition
from megarlx.evaluation.readiness import PROBE
from megarlx.report import consistency
from megarlx.report.comparison import of_suite
from megarlx.report.drawing import Figure, Table, legend, one_scale, panels, with_interval
from megarlx.report.runs import Evaluation
from megarlx.report.settings import quantity
from megarlx.report.study import BASE, KS, Cell, Study
from megarlx.report.style import BLUE, GREEN, GREY, VERMILION, in_order, look_of
from megarlx.units import duration, flop

KINDS = (
    ("kept", GREEN, "", "solved before and after"),
    ("acquired", BLUE, "//", "only after"),
    ("forgotten", VERMILION, "xx", "only before"),
    ("never", "#E3E3E3", "", "never"),
)


def single_questions(study: Study) -> Figure | None:
    through = consistency.of_trunks(study)
    excursions = consistency.of_recipes(study)
    order = in_order(set(excursions))
    rows: dict[str, dict[str, Transition]] = {}
    if through:
        rows["Checkpoint to checkpoint"] = {
            f"{quantity(a)} → {quantity(b)}": moves for (a, b), moves in through.items()
        }
    if excursions:
        rows["Checkpoint to recipe"] = {label: excursions[label] for label in order}
    if not rows:
        return None
    table: Table = [
        ["from → to", "kind", "retained", "acquired", "forgotten", "flips", "Δ pass@1", "Δ pass@k"]
    ]
    for moves_of in rows.values():
        for name, moves in moves_of.items():
            rates = (moves.retention, moves.acquisition, moves.forgetting, moves.flip_rate)
            shown = ["–" if math.isnan(r) else f"{100 * r:.0f}%" for r in rates]
            kind, *changes = _coverage(study, name)
            table.append([_name(name, order), kind, *shown, *changes])

    def draw(wide: bool) -> Canvas:
        heights = [0.33 * len(moves) + 0.5 for moves in rows.values()]
        canvas, axes = panels(list(rows), heights, wide=wide)
        for ax, moves_of in zip(axes, rows.values(), strict=True):
            _draw_moves(ax, moves_of, order)
            ax.set_xlabel("share of the questions, %")
        patches = [Patch(facecolor=c, hatch=h, edgecolor="white", label=t) for _, c, h, t in KINDS]
        legend(canvas, [], patches)
        return canvas

    return Figure(
        "consistency",
        "Single questions",
        "A question is solved when at least half of its samples are right. Retained and forgotten "
        "are shares of what was solved before, acquired of what was not; flips are acquired and "
        "forgotten together, of all questions. Expansion: "
        "pass@k rose against the base, at the largest k that was measured; sharpening: it fell "
        "while pass@1 rose; both by 95% intervals.",
        "Bars with the shares of questions solved before and after, only after, only before and "
        "never. The rates are in the table.",
        table,
        draw,
    )


def _name(label: str, labels: list[str]) -> str:
    return look_of(label, labels).name if label in labels else label


def _draw_moves(ax: Axes, moves_of: Mapping[str, Transition], labels: list[str]) -> None:
    for row, moves in enumerate(moves_of.values()):
        left = 0.0
        for kind, color, hatch, _ in KINDS:
            share = 100 * getattr(moves, kind) / moves.questions
            ax.barh(row, share, left=left, height=0.66, color=color, hatch=hatch, edgecolor="white")
            left += share
    ax.set_yticks(range(len(moves_of)), [fill(_name(n, labels), 20) for n in moves_of])
    ax.set_ylim(len(moves_of) - 0.5, -0.5)
    ax.set_xlim(0, 100)
    ax.grid(axis="y", visible=False)


def _coverage(study: Study, label: str) -> list[str]:
    pairs = [(c, b) for c in study.cells if c.label == label and (b := study.base_of(c))]
    found = consistency.coverage([p for p in pairs if p[0].recipe != BASE], KS)
    if found is None:
        return ["–", "–", "–"]
    return [found.verdict, with_interval(found.at_1), with_interval(found.at_k)]


COSTS = {
    "seconds": "time",
    "trained_tokens": "tokens trained on, with padding",
    "generated_tokens": "tokens generated",
    "flop": "arithmetic",
}


def cost(study: Study) -> Figure | None:
    """The mean over cells of what a run took, from the checkpoint to its end."""
    by_label: dict[str, list[dict[str, float]]] = {}
    for cell in study.cells:
        if cell.recipe != BASE and cell.run.finished and cell.cost:
            by_label.setdefault(cell.label, []).append(cell.cost)
    labels = in_order(set(by_label))
    means = {
        key: {
            label: sum(known) / len(known)
            for label in labels
            if (known := [c[key] for c in by_label[label] if math.isfinite(c.get(key, math.nan))])
        }
        for key in COSTS
    }
    shown = {key: values for key, values in means.items() if any(values.values())}
    if not shown:
        return None

    def draw(wide: bool) -> Canvas:
        height = 0.34 * len(labels) + 0.55
        canvas, axes = panels([COSTS[k] for k in shown], height, wide=wide)
        for ax, (key, values) in zip(axes, shown.items(), strict=True):
            _draw_costs(ax, key, values, labels)
        return canvas

    table: Table = [["recipe", *(COSTS[k] for k in shown), "runs"]]
    for label in labels:
        numbers = [_amount(k, v[label]) if label in v else "–" for k, v in shown.items()]
        table.append([look_of(label, labels).name, *numbers, str(len(by_label[label]))])
    return Figure(
        "cost",
        "Cost",
        "What a recipe took from the checkpoint to its end; the mean over checkpoints and seeds. "
        "FLOP are floating-point operations: 1 TFLOP is 10¹² of them.",
        f"Bars of {', '.join(COSTS[k] for k in shown)} for each recipe. The numbers are in the "
        "table.",
        table,
        draw,
    )


def _draw_costs(ax: Axes, key: str, values: Mapping[str, float], labels: list[str]) -> None:
    for row, label in enumerate(labels):
        value = values.get(label, 0.0)
        ax.barh(row, value, height=0.66, color=look_of(label, labels).color)
        ax.annotate(
            _amount(key, value) if label in values else "not logged",
            (value, row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
        )
    ax.set_yticks(range(len(labels)), [fill(look_of(x, labels).name, 22) for x in labels])
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.set_xlim(0, 1.35 * max(values.values()))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _amount(key, x) if x else "0"))
    ax.locator_params(axis="x", nbins=3)
    ax.grid(axis="y", visible=False)


def _amount(kind: str, value: float) -> str:
    if kind == "seconds":
        return duration(value)
    return flop(value) if kind == "flop" else f"{quantity(value)} tokens"


@dataclass(frozen=True)
class _Start:
    """What a probe said, in percent, and the gain that followed, in points."""

    cell: Cell
    probe: Evaluation
    gain: Interval

    def percent(self, metric: str) -> float | None:
        if metric == "pass_at_1" and not self.probe.suite.endswith(PROBE):
            return None  # at another temperature
        value = self.probe.metrics.get(metric)
        return None if value is None else 100 * value

    @property
    def widest(self) -> str:
        """pass@k of the probe at its largest k."""
        ks = [int(m[8:]) for m in self.probe.metrics if m.startswith("pass_at_")]
        if not self.probe.suite.endswith(PROBE) or not ks:
            return "–"
        return f"{100 * self.probe.metrics[f'pass_at_{max(ks)}']:.1f} (k = {max(ks)})"


FEWEST = 3  # different shares that make a picture

PROBED = {
    "informative_groups": "informative groups before RL, %",
    "pass_at_1": "pass@1 before RL at its temperature, %",
}


def readiness(study: Study) -> Figure | None:
    """Each excursion with RL: what the probe said before it, and the gain that followed."""
    starts = list(_starts(study))
    if not starts:
        return None
    by = {s.cell.label for s in starts}
    told_by_checkpoint = len(by) == 1
    names = (
        [f"{quantity(t)} tokens" for t in sorted({s.cell.checkpoint_tokens for s in starts})]
        if told_by_checkpoint
        else in_order(by)
    )
    measured = {m: {s.percent(m) for s in starts} - {None} for m in PROBED}
    shown = [m for m, values in measured.items() if len(values) >= FEWEST]
    few = "" if shown else " Too few differ for a picture."

    def draw(wide: bool) -> Canvas:
        canvas, axes = panels(["gain in pass@1, points"] * len(shown), 2.7, wide=wide)
        for ax, metric in zip(axes, shown, strict=True):
            _draw_starts(ax, starts, metric, names, told_by_checkpoint)
        one_scale(axes, y=True)
        looks = [look_of(name, names) for name in names]
        handles = [
            Line2D([], [], color=k.color, marker=k.marker, mfc="none", ls="none", label=k.name)
            for k in looks
        ]
        no_change = Line2D([], [], color=GREY, linestyle=(0, (1, 2)), label="no change")
        legend(canvas, [], [*handles, no_change])
        return canvas

    table: Table = [
        [
            *("run", "tokens", "measured by", "informative groups, %", "pass@1, %", "pass@k, %"),
            "gain, points",
        ]
    ]
    for start in starts:
        values = [start.percent(metric) for metric in PROBED]
        table.append(
            [
                start.cell.run.name,
                quantity(start.cell.checkpoint_tokens),
                f"{start.probe.suite}, step {start.probe.iteration:,}",
                *("–" if value is None else f"{value:.1f}" for value in values),
                start.widest,
                with_interval(start.gain),
            ]
        )
    return Figure(
        "readiness",
        "Readiness for RL",
        "Where RL begins, the model draws groups of samples of RL's own prompts at the temperature "
        "that RL trains with. A group is informative when it holds right and wrong answers: others "
        "teach nothing. The gain that followed is that of the headline suite, with its 95% "
        "interval. Runs without a probe of their own show what a suite of their base says." + few,
        "A point for each excursion with RL: the share of informative groups and pass@1 before it, "
        "and the gain in pass@1 that followed. The numbers are in the table.",
        table,
        draw if shown else None,
    )


def _draw_starts(
    ax: Axes, starts: list[_Start], metric: str, names: list[str], told_by_checkpoint: bool
) -> None:
    for start in starts:
        x, gain = start.percent(metric), start.gain
        name = f"{quantity(start.cell.checkpoint_tokens)} tokens"
        look = look_of(name if told_by_checkpoint else start.cell.label, names)
        if x is None:
            continue
        if math.isfinite(gain.low):
            ax.plot([x, x], [gain.low, gain.high], color=look.color, linewidth=1.2)
        ax.plot(
            [x],
            [gain.estimate],
            look.marker,
            color=look.color,
            markersize=7,
            markerfacecolor="none",  # where points meet both can be seen
            markeredgewidth=1.6,
        )
    ax.set_xlabel(PROBED[metric])
    ax.axhline(0, color=GREY, linestyle=(0, (1, 2)), linewidth=1.3, zorder=0)


def _starts(study: Study) -> Iterator[_Start]:
    for cell in study.cells:
        probe = None if cell.recipe == BASE else study.readiness_of(cell)
        if probe is None or (probe not in cell.run.evaluations and cell.recipe != "rl"):
            continue
        change = of_suite(cell.headline, study.before_rl(cell, probe), "pass_at_1")
        gain = interval_of_mean(list(change.values()))
        if gain is not None:
            yield _Start(cell, probe, gain)
