"""Completions and episodes of each run, from its newest files: one that was right, one that was
not. The files are those of the headline suite and of every environment; or else the newest of all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarlx.report.runs import Run
from megarlx.report.study import Study

RUNS_SHOWN = 24
CHARACTERS_SHOWN = 1200
LINES_READ = 2000


@dataclass(frozen=True)
class Example:
    run: str
    file: str
    prompt: str
    completion: str
    reference: str
    reward: float | None
    finish_reason: str


def examples(study: Study) -> list[Example]:
    """Files that cannot be read are named among the study's problems."""
    found: list[Example] = []
    shown = 0
    for run in study.runs:
        made = list(_of_run(study, run)) if shown < RUNS_SHOWN else []
        shown += bool(made)
        found += made
    return found


def _of_run(study: Study, run: Run) -> Iterator[Example]:
    for file in _newest(study, run):
        yield from _of_file(study, run, file)


def _newest(study: Study, run: Run) -> list[Path]:
    folder = run.path / "samples"
    suites = (study.headline, *study.agent_suites)
    by_suite = [sorted(folder.glob(f"iter_*.{suite}.jsonl")) for suite in suites]
    return [files[-1] for files in by_suite if files] or sorted(folder.glob("*.jsonl"))[-1:]


def _of_file(study: Study, run: Run, file: Path) -> Iterator[Example]:
    try:
        lines = list(_lines(file))
        best = max(lines, key=_reward, default=None)
        worst = min(lines, key=_reward, default=None)
        chosen = [best] if best is worst else [best, worst]
        made = [_example(run, file, line) for line in chosen if line is not None]
    except (OSError, ValueError, KeyError, TypeError) as error:
        study.problems.append(f"{run.name}/samples/{file.name}: cannot be used: {error}")
        return
    yield from made


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """A last line that a kill cut off is left out."""
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream):
            if number >= LINES_READ or not line.endswith("\n"):
                return
            yield json.loads(line)


def _reward(line: dict[str, Any]) -> float:
    reward = line.get("reward")
    return -1e9 if reward is None else float(reward)


def _example(run: Run, file: Path, line: dict[str, Any]) -> Example:
    reward = line.get("reward")
    seen_first = "\n" if "turns" in line else ""
    return Example(
        run.name,
        file.name,
        _short(line["prompt"]) + seen_first,
        _short(line["completion"]),
        _short(line.get("reference")),
        None if reward is None else float(reward),
        str(line.get("finish_reason") or "–"),
    )


def _short(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= CHARACTERS_SHOWN else text[:CHARACTERS_SHOWN] + " …"
