"""Completions of each run, from the newest file it has: one that was right, one that was not."""

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
    suite = study.headline
    folder = run.path / "samples"
    files = sorted(folder.glob(f"iter_*.{suite}.jsonl")) or sorted(folder.glob("*.jsonl"))
    if not files:
        return
    file = files[-1]
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
    return Example(
        run.name,
        file.name,
        _short(line["prompt"]),
        _short(line["completion"]),
        _short(line.get("reference")),
        None if reward is None else float(reward),
        str(line.get("finish_reason") or "–"),
    )


def _short(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= CHARACTERS_SHOWN else text[:CHARACTERS_SHOWN] + " …"
