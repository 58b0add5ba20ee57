"""Reads the runs under a folder from their files: lineage, settings, metrics, evaluations.

A file that cannot be read is named in `problems` and left out: a report of a sweep that is half
finished, or has one damaged run, still shows the rest.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from megarlx import plug
from megarlx.config import as_asked
from megarlx.config.objectives import PRETRAINING
from megarlx.evaluation.comparable import apart, how_asked
from megarlx.evaluation.pass_at_k import pass_at_k
from megarlx.training.metrics import read_metrics

FORMAT = 1
ACCURACY_KINDS = ("choice", "cloze")
AGENT = "agent"
NOT_RUNS = ("checkpoints", "tensorboard", "evaluations", "samples", "logs")
T = TypeVar("T")


class ReportError(ValueError):
    """A folder that no report can be made of."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    suite: str
    kind: str
    iteration: int
    trunk_tokens: int
    metrics: Mapping[str, float]
    standard_errors: Mapping[str, float]
    guessing: Mapping[str, float]
    items: tuple[Mapping[str, Any], ...] = field(repr=False)
    template: Mapping[str, str] | None = None  # what the questions were written in, if in any
    how: Mapping[str, Any] = field(default_factory=dict, repr=False)  # evaluation/comparable.py
    _values: dict[str, dict[str, float]] = field(default_factory=dict, init=False, repr=False)

    def asked_like(self, other: Evaluation) -> bool:
        """Whether the same was measured: else a difference is that of prompts or settings too."""
        return self.template == other.template and not apart(self.how, other.how)

    def percent(self, metric: str) -> dict[str, float]:
        """Question -> "pass_at_K" or "accuracy" of it, in percent; {} where it was not measured."""
        if metric not in self._values:
            self._values[metric] = self._percent(metric)
        return self._values[metric]

    def _percent(self, metric: str) -> dict[str, float]:
        if self.kind == "pass_at_k" and metric.startswith("pass_at_"):
            k = int(metric.removeprefix("pass_at_"))
            return {
                str(item["id"]): 100 * pass_at_k(item["samples"], item["correct"], k)
                for item in self.items
                if item["samples"] >= k
            }
        if self.kind == AGENT and metric == "success":
            return {
                str(item["id"]): 100 * item["correct"] / item["samples"]
                for item in self.items
                if item["samples"]
            }
        if self.kind in ACCURACY_KINDS and metric == "accuracy":
            return {str(item["id"]): 100 * float(item["correct"]) for item in self.items}
        return {}

    def solved(self) -> dict[str, bool]:
        """Question -> whether it is answered rightly at least as often as not."""
        metric = "accuracy" if self.kind in ACCURACY_KINDS else "pass_at_1"
        return {question: value >= 50 for question, value in self.percent(metric).items()}

    @cached_property
    def groups(self) -> dict[str, str]:
        return {str(item["id"]): str(item["group"]) for item in self.items if "group" in item}


@dataclass(frozen=True)
class Parent:
    run: str  # as it stands in lineage.json
    iteration: int
    trunk_tokens: int
    is_base: bool  # whether its weights had seen pre-training only


@dataclass(frozen=True)
class Part:
    """A run whose weights, or what it changed, is in a sum of weights."""

    run: str
    recipe: str
    weight: float


@dataclass(frozen=True, eq=False)
class Run:
    path: Path
    name: str  # the path below the reported folder
    recipe: str | None  # None for pre-training
    seed: int
    trunk_tokens: int  # pre-training tokens at its start
    parent: Parent | None
    composition: Mapping[str, float]
    settings: Mapping[str, Any]  # resolved.json
    metrics: tuple[Mapping[str, float], ...] = field(repr=False)
    evaluations: tuple[Evaluation, ...] = field(repr=False)  # by iteration
    parts: tuple[Part, ...] = ()  # of which it is a sum, beside its parent's weights
    converted: bool = False  # from a model that was trained elsewhere

    @property
    def is_trunk(self) -> bool:
        """Whether it pre-trains: from nothing, or nothing but that from a run that did."""
        if self.parent is None or self.parts:
            return self.parent is None
        stages = self.settings.get("stages") or ()
        trained = {name for stage in stages for name in stage.get("objectives") or ()}
        return self.parent.is_base and trained == {PRETRAINING}

    @property
    def told(self) -> dict[str, Any]:
        """Its settings; of a sum of weights also how much of which recipes it is."""
        if not self.parts:
            return dict(self.settings)
        weights = " ".join(f"{part.weight:g}" for part in self.parts)
        recipes = " ".join(part.recipe for part in self.parts)
        return {**self.settings, "sum": {"weights": weights, "of": recipes}}

    @property
    def planned_steps(self) -> int | None:
        """As its settings say; None where they do not. A sum of weights and a converted
        model have no steps to take."""
        if self.parts or self.converted:
            return None
        stages = self.settings.get("stages") or ()
        counts = [stage.get("steps", stage.get("iterations")) for stage in stages]
        if counts and all(isinstance(count, int) for count in counts):
            return sum(counts)
        steps = (self.settings.get("training") or {}).get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def steps_done(self) -> int:
        """As far as its metrics and evaluations tell."""
        steps = [int(line["step"]) for line in self.metrics[-1:]]
        return max([*steps, *(e.iteration for e in self.evaluations)], default=0)

    @property
    def finished(self) -> bool:
        return self.planned_steps is None or self.steps_done >= self.planned_steps

    def at(self, iteration: int) -> dict[str, Evaluation]:
        """The evaluations of one iteration, by suite."""
        return {e.suite: e for e in self.evaluations if e.iteration == iteration}

    def course(self, suite: str) -> list[Evaluation]:
        """The evaluations of one suite, as training went on."""
        return [e for e in self.evaluations if e.suite == suite]

    def last(self, suite: str) -> Evaluation | None:
        course = self.course(suite)
        return course[-1] if course else None

    def cost(self, iteration: int | None = None) -> dict[str, float]:
        """What the run, or its steps up to `iteration`, took: seconds, tokens, flop."""
        found: dict[str, float] = {}
        for line in self.metrics:
            if iteration is not None and line["step"] > iteration:
                break
            found |= {k.removeprefix("cost/"): v for k, v in line.items() if k[:5] == "cost/"}
        return found

    def first_step_with(self, prefix: str) -> int | None:
        for line in self.metrics:
            if any(key.startswith(prefix) for key in line):
                return int(line["step"])
        return None


def find_runs(root: Path) -> tuple[list[Run], list[str]]:
    """The runs below a folder, by name, and what could not be read."""
    if not root.is_dir():
        raise ReportError(f"{root} is not a folder; allowed is one that holds runs at any depth")
    problems: list[str] = []
    runs = [read_run(path, root, problems) for path in sorted(_run_folders(root))]
    return [run for run in runs if run is not None], problems


def _run_folders(root: Path) -> Iterator[Path]:
    for folder, below, files in os.walk(root):
        if "lineage.json" in files:
            yield Path(folder)
            below[:] = [name for name in below if name not in NOT_RUNS]
        below[:] = [name for name in below if not name.startswith(".")]


def read_run(path: Path, root: Path, problems: list[str]) -> Run | None:
    """The run in a folder, named by its path from `root`; what is wrong is added to `problems`."""
    name = Path(os.path.relpath(path, root)).as_posix()

    def read(file: Path, make: Callable[[Any], T]) -> T | None:
        try:
            return make(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            shown = Path(os.path.relpath(file, root)).as_posix()
            problems.append(f"{shown}: cannot be used: {said(error)}")
            return None

    lineage = read(path / "lineage.json", lineage_of)
    if lineage is None:
        return None
    resolved = path / "resolved.json"
    settings = (read(resolved, settings_of) if resolved.exists() else None) or {}
    files = sorted((path / "evaluations").glob("iter_*.json"))
    evaluations = [e for file in files if (e := read(file, evaluation_of)) is not None]
    evaluations.sort(key=lambda e: (e.iteration, e.suite))
    try:
        metrics = tuple(numbers(line) for line in read_metrics(path / "metrics.jsonl"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"{name}/metrics.jsonl: cannot be used: {said(error)}")
        metrics = ()
    return Run(
        path,
        name,
        **lineage,
        settings=settings,
        metrics=metrics,
        evaluations=tuple(evaluations),
    )


def said(error: Exception) -> str:
    return f"lacks {error}" if isinstance(error, KeyError) else str(error)


def _object(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise TypeError("holds no JSON object")
    return values


def settings_of(values: Any) -> dict[str, Any]:
    """Without what a machine chose for itself: the same experiment on two machines is one."""
    return as_asked(_object(values))


def lineage_of(values: Any) -> dict[str, Any]:
    given = _object(values).get("parent")
    parent = None
    if given is not None:
        tokens = given.get("trunk_tokens", values.get("trunk_tokens", 0))
        others = (n for name, n in (given.get("tokens") or {}).items() if name != PRETRAINING)
        parent = Parent(str(given["run"]), int(given["iteration"]), int(tokens), not any(others))
    recipe = values.get("recipe")
    return {
        "parts": _parts(values.get("sum")),
        "converted": bool(values.get("converted")),
        "recipe": None if recipe is None else str(recipe),
        "seed": int(values.get("seed", 0)),
        "trunk_tokens": int(values.get("trunk_tokens", 0)),
        "parent": parent,
        "composition": {str(k): float(v) for k, v in (values.get("composition") or {}).items()},
    }


def _parts(made: Any) -> tuple[Part, ...]:
    terms = [] if made is None else _object(made)["terms"]
    return tuple(
        Part(
            Path(str(term["plus"]["run"])).name,
            str(term["plus"]["recipe"] or "pre-training"),
            float(term["weight"]),
        )
        for term in terms
    )


def evaluation_of(values: Any) -> Evaluation:
    if _object(values).get("format") != FORMAT:
        raise ValueError(f"format is {values.get('format')!r}; allowed is {FORMAT}")
    if problem := plug.problem("suite", str(values["kind"])):
        raise ValueError(f"kind {problem}")
    settings = values.get("settings") or {}
    made = Evaluation(
        suite=str(values["suite"]),
        kind=values["kind"],
        iteration=int(values["iteration"]),
        trunk_tokens=int(values["trunk_tokens"]),
        metrics=numbers(values["metrics"]),
        standard_errors=numbers(values.get("standard_errors") or {}),
        guessing=numbers(values.get("guessing") or {}),
        items=tuple(map(_object, values["items"])),
        template=settings.get("template"),
        how=how_asked(settings),
    )
    made.solved()  # items that lack something are told of here, with the file's name
    return made


def numbers(values: Any) -> dict[str, float]:
    """Metrics are numbers; JSON has no infinity and no NaN, which are written as words."""
    found = {key: float(value) for key, value in _object(values).items() if value is not None}
    if "step" in found and not math.isfinite(found["step"]):
        raise ValueError(f"step is {found['step']}")
    return found
