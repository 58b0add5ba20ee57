"""Agents: how many tasks of each environment are solved, on held-out tasks and in play."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable

from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from megarlx.evaluation.bootstrap import Interval, interval_of_mean
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
from megarlx.report.runs import AGENT, Evaluation, Run
from megarlx.report.study import Study
from megarlx.report.style import GREY, in_order, look_of

IN_PLAY = re.compile(r"rl/(?:.+/)?success_(.+)")  # a key of metrics.jsonl
WINDOW = 5  # logged steps that a point of the course in play is the mean of


def success(study: Study) -> Figure | None:
    """A panel for each suite, and for each environment that was played in; runs that differ in
    their seed alone are pooled at the steps that all of them have."""
    runs: defaultdict[str, list[Run]] = defaultdict(list)
    for run in study.runs:
        runs[study.recipe_of(run)].append(run)
    labels = in_order(set(runs))
    data: dict[str, dict[str, Course]] = {}
    table: Table = [["environment", "recipe", "step", "success, %", "at random, %", "turns"]]
    floors: dict[str, float] = {}
    for suite in study.agent_suites:
        panel = f"{suite}: held-out tasks solved, %"
        data[panel] = {}
        for label in labels:
            course: dict[float, Interval] = {}
            for step, found in _measured(study, runs[label], suite).items():
                solved = interval_of_mean([e.percent("success") for e in found])
                if solved is None:
                    continue
                course[step] = solved
                floor = _mean(e.guessing.get("success") for e in found)
                if floor is not None:
                    floors[panel] = 100 * floor
                turns = _mean(e.metrics.get("turns") for e in found)
                chance = "–" if floor is None else f"{100 * floor:.1f}"
                long = "–" if turns is None else f"{turns:.1f}"
                name = look_of(label, labels).name
                table.append([suite, name, f"{step:,}", with_interval(solved), chance, long])
            if course:
                data[panel][label] = course
    for name in sorted({n for run in study.runs for n in _played_in(run)}):
        courses = {
            label: _in_play([run for run in runs[label] if name in _played_in(run)], name)
            for label in labels
        }
        data[f"{name}: episodes of training solved, %"] = {k: c for k, c in courses.items() if c}
    if not any(data.values()):
        return None
    shown = [label for label in labels if any(label in drawn for drawn in data.values())]

    def draw(wide: bool) -> Canvas:
        canvas, axes = panels(list(data), 1.9, wide=wide)
        for ax, (panel, drawn) in zip(axes, data.items(), strict=True):
            draw_courses(ax, drawn, shown)
            ax.set_ylim(-2, 102)
            ax.set_xlabel("steps")
            if panel in floors:
                floor = floors[panel]
                ax.axhline(floor, color=GREY, linestyle=(0, (1, 2)), linewidth=1.3, zorder=0)
        one_scale(axes, x=True)
        at_random = Line2D([], [], color=GREY, linestyle=(0, (1, 2)), label="at random")
        legend(canvas, shown, [at_random] if floors else [])
        return canvas

    return Figure(
        "agents",
        "Agents",
        "How many tasks of an environment a policy solves within its turns. Of held-out tasks with "
        "95% intervals over tasks; in training the mean of several logged steps. Step 0 of an "
        "excursion is the checkpoint that it starts from.",
        f"Success over the steps of training: {'; '.join(data)}. The numbers are in the table.",
        table,
        draw,
    )


def _measured(study: Study, runs: list[Run], suite: str) -> dict[int, list[Evaluation]]:
    """Step -> the evaluations of all runs that have any."""
    courses = [course for run in runs if (course := _course(study, run, suite))]
    steps = sorted(set.intersection(*(set(course) for course in courses))) if courses else []
    return {step: [course[step] for course in courses] for step in steps}


def _course(study: Study, run: Run, suite: str) -> dict[int, Evaluation]:
    """With what was measured of the checkpoint that an excursion starts from."""
    found = {e.iteration: e for e in run.course(suite) if e.kind == AGENT}
    parent = study.parent_of(run)
    if found and parent is not None and run.parent is not None and 0 not in found:
        start = parent.at(run.parent.iteration).get(suite)
        if start is not None:
            found[0] = start
    return found


def _played_in(run: Run) -> set[str]:
    """Names of environments."""
    keys = {key for line in run.metrics for key in line}
    return {made[1] for key in keys if (made := IN_PLAY.fullmatch(key))}


def _in_play(runs: list[Run], name: str) -> Course:
    by_step: defaultdict[int, list[float]] = defaultdict(list)
    for run in runs:
        values: list[tuple[int, float]] = []
        for line in run.metrics:
            for key, value in line.items():
                if (made := IN_PLAY.fullmatch(key)) and made[1] == name and math.isfinite(value):
                    values.append((int(line["step"]), value))
        for at in range(0, len(values), WINDOW):
            part = values[at : at + WINDOW]
            by_step[part[-1][0]].append(100 * sum(v for _, v in part) / len(part))
    return {
        float(step): Interval(sum(found) / len(found), min(found), max(found), 0)
        for step, found in by_step.items()
        if len(found) == len(runs)
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
