"""The page of samples beside a report: all of RUN/samples/, to be read in a browser from disk.

    OUT/index.html  draw.js  viewer.js  viewer.css
    OUT/data/index.js                     what there is: runs, their suites and objectives, steps
    OUT/data/000/step_00000020-0003.js    a piece of a file of samples, whole groups

Data files are scripts, loaded as they are looked at: a page from disk may load no others. What a
model wrote stands in them as JSON, and is made readable here: the page shows it as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

from megarlx.data.token_files import write_atomically
from megarlx.printable import printable
from megarlx.report.runs import Run

PAGES = ("index.html", "draw.js", "viewer.js", "viewer.css")
FILE = re.compile(r"(?P<kind>step|iter)_(?P<step>\d+)\.(?P<name>.+)\.jsonl")
KINDS = {"step": "training", "iter": "evaluation"}
PIECE = 400_000  # characters, about: what a browser loads in a moment


@dataclass
class Step:
    """A file of samples, as the page knows it."""

    step: int
    file: str
    groups: int = 0
    samples: int = 0
    rewards: list[float] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)  # number of each piece's first group
    finishes: set[str] = field(default_factory=set)

    def entry(self) -> dict[str, Any]:
        mean = sum(self.rewards) / len(self.rewards) if self.rewards else None
        return {
            **{name: getattr(self, name) for name in ("step", "file", "groups", "samples")},
            "firsts": self.firsts,
            "reward": mean,
        }


def write_viewer(runs: Sequence[Run], out: Path, problems: list[str]) -> int:
    """Returns how many samples the page has; files that cannot be read are named in `problems`."""
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    for old in data.glob("*/*.js"):
        old.unlink()
    series: list[dict[str, Any]] = []
    for run in runs:
        for (name, kind), files in _by_series(run):
            folder = f"{len(series):03d}"
            steps = [s for file in files if (s := _write(run, file, data / folder, problems))]
            if steps:
                found = {"run": printable(run.name), "name": printable(name), "kind": KINDS[kind]}
                finishes = sorted({end for step in steps for end in step.finishes})
                entries = [step.entry() for step in steps]
                series.append({**found, "folder": folder, "finishes": finishes, "steps": entries})
    _script(data / "index.js", "index", {"series": series})
    for page in PAGES:
        text = resources.files("megarlx.report").joinpath("viewer", page).read_text("utf-8")
        write_atomically(out / page, text)
    return sum(step["samples"] for one in series for step in one["steps"])


def _by_series(run: Run) -> Iterator[tuple[tuple[str, str], list[Path]]]:
    """((name, kind), files by step): objectives of training first."""
    found = [(made, path) for path in (run.path / "samples").glob("*.jsonl")
             if (made := FILE.fullmatch(path.name))]  # fmt: skip
    found.sort(key=lambda one: (one[0]["kind"] != "step", one[0]["name"], int(one[0]["step"])))
    for key, files in groupby(found, key=lambda one: (one[0]["name"], one[0]["kind"])):
        yield key, [path for _, path in files]


def _write(run: Run, file: Path, folder: Path, problems: list[str]) -> Step | None:
    made = FILE.fullmatch(file.name)
    assert made is not None
    step = Step(int(made["step"]), f"{made['kind']}_{made['step']}")
    try:
        for number, piece in enumerate(_pieces(_groups(file), step)):
            key = f"{folder.name}/{step.file}-{number:04d}"
            folder.mkdir(exist_ok=True)
            _script(folder.parent / f"{key}.js", "samples", key, piece)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        problems.append(f"{run.name}/samples/{file.name}: cannot be used: {said}")
        return None
    return step if step.groups else None


def _pieces(groups: Iterable[dict[str, Any]], step: Step) -> Iterator[list[Any]]:
    """As many groups as make a piece; the step is told what is in them."""
    piece: list[Any] = []
    size = 0
    for group in groups:
        if not piece:
            step.firsts.append(step.groups)
        piece.append(group)
        size += len(json.dumps(group))
        step.groups += 1
        step.samples += len(group["samples"])
        step.rewards += [s["reward"] for s in group["samples"] if s["reward"] is not None]
        step.finishes |= {s["finish"] for s in group["samples"]}
        if size >= PIECE:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _groups(file: Path) -> Iterator[dict[str, Any]]:
    """Lines of one prompt that follow one another."""
    for (shown, prompt), lines in groupby(_lines(file), key=_key):
        samples = list(lines)
        reference = samples[0].get("reference")
        yield {
            "id": None if shown is None else printable(shown),
            "prompt": printable(prompt),
            "reference": "" if reference is None else printable(str(reference)),
            "samples": [_sample(line) for line in samples],
        }


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """A last line that a kill cut off is left out."""
    with file.open(encoding="utf-8") as stream:
        for line in stream:
            if not line.endswith("\n"):
                return
            yield json.loads(line)


def _key(line: dict[str, Any]) -> tuple[str | None, str]:
    """What the samples of a group share: an evaluation tells a question's id, training a prompt's
    number."""
    number = line.get("group")
    shown = line.get("id", None if number is None else f"prompt {number}")
    return (None if shown is None else str(shown), str(line["prompt"]))


def _sample(line: dict[str, Any]) -> dict[str, Any]:
    reward = line.get("reward")
    found: dict[str, Any] = {
        "reward": None if reward is None else float(reward),
        "finish": printable(str(line.get("finish_reason") or "–")),
    }
    if "tokens" in line:
        found |= {"tokens": _readable(line["tokens"]), "logprobs": line["logprobs"]}
    else:
        found["completion"] = printable(str(line["completion"]))
    found |= {name: line[name] for name in ("advantage", "advantages") if name in line}
    if "seen" in line:
        found["seen"] = [printable(str(one)) for one in line["seen"]]
    return found


def _readable(tokens: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[printable(token) for token in turn] for turn in tokens]


def _script(path: Path, function: str, *values: Any) -> None:
    """A call of a function of the page, in plain ASCII."""
    given = ", ".join(json.dumps(value, separators=(",", ":")) for value in values)
    text = given.replace("<", r"\u003c")  # nothing that could be taken for markup
    write_atomically(path, f"megarlx.{function}({text});\n", sync=False)
