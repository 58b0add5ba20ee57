"""All suites of an evaluation on one model: from inside training, or of a checkpoint."""

from __future__ import annotations

import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarlx import plug
from megarlx.comm.collectives import gather_values
from megarlx.config.evaluation import EvaluationConfig, SuiteConfig
from megarlx.config.trust import names_in
from megarlx.evaluation import behaviour
from megarlx.evaluation.beforehand import check_there
from megarlx.evaluation.comparable import apart, how_asked, shown
from megarlx.evaluation.interface import Asked, Measured, Progress, Subject
from megarlx.evaluation.questions import made_suite
from megarlx.evaluation.results import (
    FORMAT,
    Result,
    finished,
    read_result,
    result_path,
    samples_path,
    write_result,
    write_samples,
)
from megarlx.redact import redacted

Say = Callable[[str], None]


@dataclass(frozen=True)
class Parent:
    """Where an excursion came from: what behaviour drifts away from."""

    run: Path
    iteration: int


def evaluate(
    subject: Subject,
    config: EvaluationConfig,
    *,
    run: Path | None = None,
    parent: Parent | None = None,
    say: Say | None = None,
    again: bool = False,
) -> list[Result]:
    """The result of every suite, on every rank; called by all of them.

    With `run`, results are written there, and those that are there already are not computed
    again; with `again` they are.
    """
    check_there(config)
    return [_suite(subject, config, suite, run, parent, say, again) for suite in config.suites]


def _check_writable(run: Path) -> None:
    """Before anything is measured that could not be kept."""
    for place in (run / "evaluations", run / "samples"):
        there = next((at for at in (place, *place.parents) if at.exists()), place)
        if not os.access(there, os.W_OK):
            raise PermissionError(f"{place}: results are written there, and it cannot be written")


def metrics_of(results: Sequence[Result]) -> dict[str, float]:
    """As keys of metrics.jsonl and TensorBoard: eval/SUITE/accuracy, …"""
    return {
        f"eval/{result['suite']}/{name}": value
        for result in results
        for name, value in result["metrics"].items()
    }


def _suite(
    subject: Subject,
    config: EvaluationConfig,
    suite: SuiteConfig,
    run: Path | None,
    parent: Parent | None,
    say: Say | None,
    again: bool,
) -> Result:
    mesh = subject.model.mesh
    first = mesh.rank == 0
    settings = settings_of(subject, config, suite)
    path = None if run is None else result_path(run, subject.iteration, suite.name)
    # One process looks: the others might see another moment of a shared file system.
    there = finished(path, settings) if first and path is not None and not again else None
    there = gather_values(there, mesh.world)[0]
    if there is not None:
        if say is not None and first:
            say(f"{suite.name}: there already")
        done: Result = there
        return done
    if run is not None:
        _check_writable(run)
    if first and say is not None and path is not None and path.exists():
        _say_what_goes(suite.name, path, settings, say)
    begin = time.perf_counter()
    progress = _progress(suite) if first and say is not None else None
    measure: Callable[[Asked], Measured] = plug.resolve("suite", suite.kind)
    found = measure(Asked(subject, config, suite, progress))
    result: Result = {
        "format": FORMAT,
        "suite": suite.name,
        "kind": suite.kind,
        "iteration": subject.iteration,
        "trunk_tokens": subject.trunk_tokens,
        "metrics": dict(found.metrics),
        "standard_errors": dict(found.standard_errors),
        **({} if found.guessing is None else {"guessing": dict(found.guessing)}),
        "items": [*found.items],
    }
    lines = found.samples
    if suite.kind == "behaviour" and parent is not None:
        _add_drift(result, settings, parent, first, mesh.world)
    result |= {"settings": settings, "seconds": time.perf_counter() - begin}
    if first and run is not None and path is not None:
        if lines:
            write_samples(samples_path(run, subject.iteration, suite.name), lines)
        write_result(path, result)  # last: it says that the suite is done
    if first and say is not None:
        say(f"{suite.name}: {described(result)}")
    return result


def _say_what_goes(name: str, path: Path, settings: Mapping[str, Any], say: Say) -> None:
    """A run has one result of a suite and a step: that of other settings is replaced."""
    before, now = how_asked(read_result(path).get("settings") or {}), how_asked(settings)
    if names := apart(before, now):
        say(f"{name}: with {shown(now, names)}; replaces the result with {shown(before, names)}")


def settings_of(subject: Subject, config: EvaluationConfig, suite: SuiteConfig) -> dict[str, Any]:
    """All that a result depends on."""
    asked_in = suite.uses_template or not suite.is_ours
    template = subject.template_of(suite) if asked_in else None
    return {
        "suite": redacted(suite.model_dump(mode="json")),
        "seed": config.seed,
        "kept_samples": config.kept_samples,
        "checkpoint": subject.digest,
        "precision": str(subject.model.pipeline.dtype).removeprefix("torch."),
        "is_base": subject.is_base,
        "tokenizer": subject.tokenizer.fingerprint,
        "template": None if template is None else template.described,
        "files": {name: _sha256(path) for name, path in _files_of(suite)},
        "made": None if suite.made is None else made_suite(suite, subject.made).identity,
    }


def _files_of(suite: SuiteConfig) -> Iterator[tuple[str, str | Path]]:
    """What it reads, and the code of the user's that scores it."""
    yield from ((path, path) for path in (suite.path, suite.few_shot_path) if path is not None)
    for _, kind, name in names_in(suite):
        if name not in plug.ours(kind) and (path := plug.file_of(name)) is not None:
            yield name, path


def _sha256(path: str | Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _add_drift(
    result: Result, settings: Mapping[str, Any], parent: Parent, first: bool, world: Any
) -> None:
    """Where the parent was measured with the same suite, and asked alike."""
    path = result_path(parent.run, parent.iteration, result["suite"])
    found: Any = None
    if first and path.exists():
        before = read_result(path)
        sides = [how_asked(one) for one in (before["settings"], settings)]
        if before["settings"]["template"] != settings["template"]:
            found = f"none: {path} was asked in another template"
        elif names := apart(*sides):
            own, others = (shown(side, names) for side in reversed(sides))
            found = f"none: {path} was measured with {others}, and this with {own}"
        else:
            away = behaviour.drift(result, before)
            found = [away.estimate, away.low, away.high]
    found = gather_values(found, world)[0]
    if isinstance(found, str):
        result["no_drift"] = found
    elif found is not None:
        result["metrics"]["drift"] = found[0]
        result["drift_interval"] = found[1:]


def described(result: Result) -> str:
    """In one line; guessing beside every pass@k."""
    parts = []
    for name, value in result["metrics"].items():
        error = result["standard_errors"].get(name)
        around = "" if error is None or math.isnan(error) else f" ± {error:.3f}"
        guess = result.get("guessing", {}).get(name)
        by_guessing = "" if guess is None else f" (guessing {guess:.3f})"
        parts.append(f"{name} {value:.3f}{around}{by_guessing}")
    if "no_drift" in result:
        parts.append(f"drift {result['no_drift']}")
    return "  ".join(parts)


def _progress(suite: SuiteConfig) -> Progress | None:
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{suite.name}: {done} of {total} questions", end=end, file=sys.stderr, flush=True)

    return show
