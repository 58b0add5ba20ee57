"""What happens inside runs, to single questions, and what it costs; readiness beside the gain."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from megarlx.evaluation.bootstrap import Interval, interval_of_mean
from megarlx.evaluation.consistency import Transition
from megarlx.evaluation.readiness import PROBE
from megarlx.report import consistency
from megarlx.report.comparison import of_suite
from megarlx.report.drawing import (
    Course,
    Figure,
    Table,
    draw_courses,
    legend,
    panels,
    with_interval,
)
from megarlx.report.figures import guessing_of
from megarlx.report.runs import Evaluation
from megarlx.report.settings import quantity
from megarlx.report.study import BASE, KS, Cell, Study
from megarlx.report.style import BLUE, GREEN, GREY, VERMILION, in_order, look_of


def dynamics(study: Study) -> Figure | None:
    """A panel for each recipe: pass@k at the steps that all its finished runs were evaluated at."""
    data: dict[str, dict[str, Course]] = {}
    for label in in_order({c.label for c in study.cells if c.recipe != BASE and c.run.finished}):
        courses = [
            course
            for cell in study.cells
            if cell.label == label and cell.run.finished
            if len(course := _course_of(study, cell)) > 1
        ]
        steps = sorted(set.intersection(*(set(c) for c in courses))) if courses else []
        lines: dict[str, Course] = {}
        for k in KS:
            points = {
                float(step): interval_of_mean([c[step].percent(f"pass_at_{k}") for c in courses])
                for step in steps
            }
            found = {step: interval for step, interval in points.items() if interval}
            if len(found) > 2:  # start and end alone are in the other figures
                lines[f"pass@{k}"] = found
        if lines:
            data[label] = lines
    if not data:
        return None
    names = [look_of(label, list(data)).name for label in data]
    canvas, axes = panels([f"{name}, %" for name in names], 1.9, share_x=False)
    labels = [f"pass@{k}" for k in KS if any(f"pass@{k}" in lines for lines in data.values())]
    table: Table = [["recipe", "step", *labels]]
    for ax, (label, lines), name in zip(axes, data.items(), names, strict=True):
        draw_courses(ax, lines, labels)
        ax.set_xlabel("steps")
        for step in _starts_of_rl(study, label):
            ax.axvline(step, color=GREY, linestyle=(0, (1, 2)), linewidth=1.3, zorder=0)
        for step in sorted({s for line in lines.values() for s in line}):
            values = [with_interval(lines.get(metric, {}).get(step)) for metric in labels]
            table.append([name, f"{step:,.0f}", *values])
    legend(
        canvas,
        labels,
        [Line2D([], [], color=GREY, linestyle=(0, (1, 2)), label="RL begins")],
    )
    return Figure(
        "dynamics",
        "Inside the runs",
        "pass@k while a recipe runs, pooled over checkpoints and seeds. Step 0 is the checkpoint "
        "that it starts from." + _guessing(study),
        f"pass@1, pass@8 and pass@32 over the steps of {', '.join(names)}. The numbers are in the "
        "table.",
        table,
        canvas,
    )


def _guessing(study: Study) -> str:
    reached = {f"pass@{k}": guessing_of(study.cells, k) for k in KS}
    said = ", ".join(f"{name} {value:.1f}%" for name, value in reached.items() if value is not None)
    return f" Guessing reaches {said}." if said else ""


def _course_of(study: Study, cell: Cell) -> dict[int, Evaluation]:
    course = {e.iteration: e for e in cell.run.course(study.headline or "")}
    base = study.base_of(cell)
    if base is not None and 0 not in course:
        start = base.evaluations.get(study.headline or "") or base.headline
        if start is not None and all(start.asked_like(e) for e in course.values()):
            course[0] = start
    return course


def _starts_of_rl(study: Study, label: str) -> set[float]:
    """Where RL does not begin with the run."""
    found = set()
    for cell in study.cells:
        trained = [line for line in cell.run.metrics if any(key[:5] == "loss/" for key in line)]
        logged = [int(line["step"]) for line in trained]
        first = cell.run.first_step_with("rl/")
        if cell.label == label and first is not None and first > min(logged, default=first):
            found.add(float(max(step for step in logged if step < first)))
    return found


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
    canvas, axes = panels(list(rows), [0.33 * len(moves) + 0.5 for moves in rows.values()])
    table: Table = [
        ["from → to", "kind", "retained", "acquired", "forgotten", "flips", "Δ pass@1", "Δ pass@k"]
    ]
    for ax, moves_of in zip(axes, rows.values(), strict=True):
        _draw_moves(ax, moves_of, order)
        for name, moves in moves_of.items():
            rates = (moves.retention, moves.acquisition, moves.forgetting, moves.flip_rate)
            shown = ["–" if math.isnan(r) else f"{100 * r:.0f}%" for r in rates]
            kind, *changes = _coverage(study, name)
            table.append([_name(name, order), kind, *shown, *changes])
    axes[-1].set_xlabel("share of the questions, %")
    patches = [Patch(facecolor=c, hatch=h, edgecolor="white", label=t) for _, c, h, t in KINDS]
    legend(canvas, [], patches)
    return Figure(
        "consistency",
        "Single questions",
        "A question is solved when at least half of its samples are right. Retained and forgotten "
        "are shares of what was solved before, acquired of what was not, flips of all. Expansion: "
        "pass@k rose against the base, at the largest k that was measured; sharpening: it fell "
        "while pass@1 rose; both by 95% intervals.",
        "Bars with the shares of questions solved before and after, only after, only before and "
        "never. The rates are in the table.",
        table,
        canvas,
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
    "seconds": "seconds",
    "trained_tokens": "tokens trained on",
    "generated_tokens": "tokens generated",
    "flop": "FLOP",
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
    canvas, axes = panels([COSTS[k] for k in shown], 0.34 * len(labels) + 0.55, share_x=False)
    for ax, (key, values) in zip(axes, shown.items(), strict=True):
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
        ax.set_xlim(0, 1.22 * max(values.values()))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _, key=key: _amount(key, x)))
        ax.locator_params(axis="x", nbins=5)
        ax.grid(axis="y", visible=False)
    table: Table = [["recipe", *(COSTS[k] for k in shown), "runs"]]
    for label in labels:
        numbers = [_amount(k, v[label]) if label in v else "–" for k, v in shown.items()]
        table.append([look_of(label, labels).name, *numbers, str(len(by_label[label]))])
    return Figure(
        "cost",
        "Cost",
        "What a recipe took from the checkpoint to its end; the mean over checkpoints and seeds.",
        f"Bars of {', '.join(COSTS[k] for k in shown)} for each recipe. The numbers are in the "
        "table.",
        table,
        canvas,
    )


def _amount(kind: str, value: float) -> str:
    if kind == "seconds":
        return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
    return f"{value:.1e}" if kind == "flop" and value else quantity(value)


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
    shown = [m for m in PROBED if any(s.percent(m) is not None for s in starts)]
    canvas, axes = panels(["Gain in pass@1, points", *[""] * (len(shown) - 1)], 2.7, share_x=False)
    for ax, metric in zip(axes, shown, strict=True):
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
    looks = [look_of(name, names) for name in names]
    handles = [
        Line2D([], [], color=k.color, marker=k.marker, mfc="none", linestyle="none", label=k.name)
        for k in looks
    ]
    no_change = Line2D([], [], color=GREY, linestyle=(0, (1, 2)), label="no change")
    legend(canvas, [], [*handles, no_change])
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
        "interval. Runs without a probe of their own show what a suite of their base says.",
        "A point for each excursion with RL: the share of informative groups and pass@1 before it, "
        "and the gain in pass@1 that followed. The numbers are in the table.",
        table,
        canvas,
    )


def _starts(study: Study) -> Iterator[_Start]:
    for cell in study.cells:
        probe = None if cell.recipe == BASE else study.readiness_of(cell)
        if probe is None or (probe not in cell.run.evaluations and cell.recipe != "rl"):
            continue
        change = of_suite(cell.headline, study.before_rl(cell, probe), "pass_at_1")
        gain = interval_of_mean(list(change.values()))
        if gain is not None:
            yield _Start(cell, probe, gain)
