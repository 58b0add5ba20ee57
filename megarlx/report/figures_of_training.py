"""What happens inside runs: pass@k while they train, and what their metrics say, a line a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.lines import Line2D

from megarlx.evaluation.bootstrap import interval_of_mean
from megarlx.report.drawing import (
    Course,
    Figure,
    Table,
    draw_courses,
    legend,
    one_scale,
    panels,
    with_interval,
)
from megarlx.report.figures import guessing_of
from megarlx.report.runs import Evaluation, Run
from megarlx.report.study import BASE, KS, Cell, Study
from megarlx.report.style import GREY, in_order, look_of

POINTS = 60  # of a line: each is the mean of the steps around it


def dynamics(study: Study) -> Figure | None:
    """A panel for each k, a line for each recipe: at the steps that all its finished runs were
    evaluated at."""
    data: dict[str, dict[str, Course]] = {f"pass@{k}, %": {} for k in KS}
    for label in in_order({c.label for c in study.cells if c.recipe != BASE and c.run.finished}):
        courses = [
            course
            for cell in study.cells
            if cell.label == label and cell.run.finished
            if len(course := _course_of(study, cell)) > 1
        ]
        steps = sorted(set.intersection(*(set(c) for c in courses))) if courses else []
        for k, lines in zip(KS, data.values(), strict=True):
            points = {
                float(step): interval_of_mean([c[step].percent(f"pass_at_{k}") for c in courses])
                for step in steps
            }
            found = {step: interval for step, interval in points.items() if interval}
            if len(found) > 2:  # start and end alone are in the other figures
                lines[label] = found
    data = {panel: lines for panel, lines in data.items() if lines}
    if not data:
        return None
    labels = in_order({label for lines in data.values() for label in lines})
    starts = {label: _starts_of_rl(study, label) for label in labels}

    def draw(wide: bool) -> Any:
        canvas, axes = panels(list(data), 2.6, wide=wide)
        for ax, lines in zip(axes, data.values(), strict=True):
            draw_courses(ax, lines, labels)
            ax.set_xlabel("steps")
            for label in lines:
                for step in starts[label]:
                    color = look_of(label, labels).color
                    ax.axvline(step, color=color, linestyle=(0, (1, 2)), linewidth=1.3, zorder=0)
        one_scale(axes, x=True, y=True)
        begins = Line2D([], [], color=GREY, linestyle=(0, (1, 2)), label="RL begins")
        legend(canvas, labels, [begins] if any(starts.values()) else [])
        return canvas

    table: Table = [["recipe", "step", *data]]
    for label in labels:
        for step in sorted({s for lines in data.values() for s in lines.get(label, {})}):
            values = [with_interval(lines.get(label, {}).get(step)) for lines in data.values()]
            table.append([look_of(label, labels).name, f"{step:,.0f}", *values])
    names = ", ".join(look_of(label, labels).name for label in labels)
    return Figure(
        "dynamics",
        "Inside the runs",
        "pass@k while a recipe runs, pooled over checkpoints and seeds. Step 0 is the checkpoint "
        "that it starts from." + _guessing(study),
        f"{', '.join(data)} over the steps of {names}. The numbers are in the table.",
        table,
        draw,
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


# The metrics of runs.

OF_POLICIES = {
    "reward": "reward",
    "response_length": "length of answers, tokens",
    "entropy": "entropy, nats a token",
    "kl": "KL from the reference, nats a token",
    "informative_groups": "informative groups, %",
}
PERCENT = ("informative_groups",)


@dataclass(frozen=True)
class _Line:
    run: Run
    label: str
    steps: list[float]
    values: list[float]


def training(study: Study) -> Figure | None:
    """Of the runs that are no trunks."""
    labels = {c.run.name: c.label for c in study.cells if c.recipe != BASE}
    runs = [run for run in study.excursions if run.name in labels]
    return _curves(
        [(run, labels[run.name]) for run in runs],
        "training",
        "Training",
        "What the runs logged over their steps, a line a run; each point is the mean of the steps "
        "around it. Reward, length, entropy and KL are those of the samples that RL trains on; a "
        "group is informative when its samples have different rewards.",
    )


def pretraining(study: Study) -> Figure | None:
    return _curves(
        [(run, BASE) for run in study.trunks],
        "pretraining",
        "Pre-training",
        "What the trunks logged over their steps, a line a run; each point is the mean of the "
        "steps around it.",
    )


def _curves(runs: Sequence[tuple[Run, str]], name: str, title: str, caption: str) -> Figure | None:
    data: dict[str, list[_Line]] = {}
    for run, label in runs:
        for panel, line in _lines_of(run, label):
            data.setdefault(panel, []).append(line)
    order = {panel: at for at, panel in enumerate(OF_POLICIES.values())}
    data = {
        panel: lines
        for panel, lines in sorted(data.items(), key=lambda item: order.get(item[0], len(order)))
        if any(value for line in lines for value in line.values)
    }
    if not data:
        return None
    labels = in_order({line.label for lines in data.values() for line in lines})

    def draw(wide: bool) -> Any:
        canvas, axes = panels(list(data), 2.1, wide=wide)
        for ax, lines in zip(axes, data.values(), strict=True):
            for line in lines:
                look = look_of(line.label, labels)
                alpha = 1 if len(lines) <= 6 else 0.6
                style = {"color": look.color, "linestyle": look.dashes, "alpha": alpha}
                ax.plot(line.steps, line.values, linewidth=1.2, **style)
            ax.set_xlabel("steps")
        one_scale(axes, x=True)
        legend(canvas, labels if len(labels) > 1 else [])
        return canvas

    return Figure(
        name,
        title,
        caption,
        f"{'; '.join(data)}, over the steps of {len(runs)} runs. Where each ends is in the table.",
        _ends(runs, data, labels),
        draw,
    )


def _lines_of(run: Run, label: str) -> Iterator[tuple[str, _Line]]:
    keys = dict.fromkeys(key for line in run.metrics for key in line)
    policies = {key.split("/")[1] if key.count("/") > 1 else "" for key in keys if key[:3] == "rl/"}
    for key in keys:
        kind, _, name = key.partition("/")
        panel, factor = "", 1.0
        if kind == "rl" and (metric := name.rpartition("/")[2]) in OF_POLICIES:
            panel, factor = OF_POLICIES[metric], 100.0 if metric in PERCENT else 1.0
        elif kind == "loss" and name not in ("rl", *policies):  # a policy's loss is no measure
            panel = f"loss of {name}, nats a token"
        elif kind == "grad_norm":
            panel = f"gradient norm of {name}"
        if panel:
            steps, values = _thinned(
                (line["step"], line[key]) for line in run.metrics if key in line
            )
            if values:
                yield panel, _Line(run, label, steps, [factor * value for value in values])


def _thinned(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    known = [(step, value) for step, value in points if math.isfinite(value)]
    size = -(-len(known) // POINTS) or 1
    parts = [known[at : at + size] for at in range(0, len(known), size)]
    return [part[-1][0] for part in parts], [sum(v for _, v in part) / len(part) for part in parts]


def _ends(
    runs: Sequence[tuple[Run, str]], data: Mapping[str, Sequence[_Line]], labels: Sequence[str]
) -> Table:
    """The last point of each line."""
    table = [["run", "recipe", "steps", *data]]
    for run, label in runs:
        found = {panel: one for panel, lines in data.items() for one in lines if one.run is run}
        if not found:
            continue
        values = [f"{found[panel].values[-1]:.4g}" if panel in found else "–" for panel in data]
        table.append([run.name, look_of(label, labels).name, f"{run.steps_done:,}", *values])
    return table
