"""What is left of finished runs when their folders are gone: one JSON file a seed.

Of each evaluation its metrics and, of suites that count, the counts of every question. A report
reads a folder of these files as it reads runs. settings.json beside them holds what the runs were
told, once for all seeds: a run names its settings by their hash. Counts up to 35 are written as one
character each, so that a study fits into a repository.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megarlx.data.token_files import write_atomically
from megarlx.report.runs import Run, evaluation_of, lineage_of, numbers, said, settings_of
from megarlx.report.settings import comparable
from megarlx.training.metrics import read_metrics

FORMAT = "megarlx records 1"
SETTINGS = "settings.json"
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
COUNTS = ("samples", "correct", "marked", "marked_correct")  # of an item
SIGNIFICANT = 6  # digits of a metric
WHOLE = ("cost/", "data/")  # prefixes of metrics that are kept
LINEAGE = ("recipe", "seed", "trunk_tokens", "composition")


def hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass
class SeedRecords:
    """The file of one seed: `done` has the hash of each finished job's settings."""

    path: Path
    seed: int
    done: dict[str, str] = field(default_factory=dict)
    questions: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def at(cls, folder: Path, seed: int) -> SeedRecords:
        path = folder / f"seed-{seed}.json"
        return cls.read(path) if path.exists() else cls(path, seed)

    @classmethod
    def read(cls, path: Path) -> SeedRecords:
        held = _read(path)
        return cls(path, held["seed"], held["done"], held["questions"], held["runs"])

    def add(self, folder: Path) -> None:
        """What the files of a run hold; evaluations of a step that are there already stay."""
        name = folder.name
        lineage = _read_json(folder / "lineage.json")
        parent = lineage["parent"]
        kept = {key: lineage[key] for key in LINEAGE} | {
            "parent": parent
            and {
                key: parent[key] for key in ("iteration", "trunk_tokens", "tokens") if key in parent
            }
            | {"run": Path(parent["run"]).name}
        }
        settings = comparable(settings_of(_read_json(folder / "resolved.json")))
        _keep_settings(self.path.parent, settings)
        evaluations = [
            self._compact(_read_json(file))
            for file in sorted((folder / "evaluations").glob("iter_*.json"))
        ]
        before = self.runs.get(name, {}).get("evaluations", [])
        there = {(e["iteration"], e["suite"]) for e in evaluations}
        evaluations += [e for e in before if (e["iteration"], e["suite"]) not in there]
        evaluations.sort(key=lambda e: (e["iteration"], e["suite"]))
        self.runs[name] = {
            "lineage": kept,
            "settings": hash_of(settings),
            "metrics": list(_metrics(folder, {e["iteration"] for e in evaluations})),
            "evaluations": evaluations,
        }

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        held = {"format": FORMAT, "seed": self.seed, "done": self.done}
        held |= {"questions": self.questions, "runs": self.runs}
        write_atomically(self.path, _lines_of(held))

    def _compact(self, evaluation: Mapping[str, Any]) -> dict[str, Any]:
        kept = {key: evaluation[key] for key in ("suite", "kind", "iteration", "trunk_tokens")}
        for key in ("metrics", "standard_errors", "guessing"):
            if evaluation.get(key):
                kept[key] = _rounded(evaluation[key])
        template = (evaluation.get("settings") or {}).get("template")
        items = evaluation["items"]
        if template is not None:
            kept["template"] = template
        if items and "correct" in items[0]:
            asked = {"ids": _ids([str(item["id"]) for item in items])}
            if "group" in items[0]:
                asked["groups"] = [item["group"] for item in items]
            name = hash_of(asked)[:12]
            self.questions.setdefault(name, asked)
            kept["questions"] = name
            columns = [key for key in COUNTS if key in items[0]]
            kept["counts"] = {key: _packed([int(item[key]) for item in items]) for key in columns}
        return kept

    def whole(self, kept: Mapping[str, Any]) -> dict[str, Any]:
        """As the file of an evaluation has it."""
        items: list[dict[str, Any]] = []
        if "questions" in kept:
            asked = self.questions[kept["questions"]]
            items = [{"id": name} for name in _ids_of(asked["ids"])]
            columns = {key: _counts_of(value, len(items)) for key, value in kept["counts"].items()}
            for key, values in (columns | {"group": asked.get("groups", [])}).items():
                for item, value in zip(items, values, strict=False):
                    item[key] = value
        settings = {"template": kept.get("template")}
        return {"format": 1, "metrics": {}, **kept, "items": items, "settings": settings}


def runs_of_records(root: Path, problems: list[str]) -> list[Run]:
    """Those that the files below a folder tell of; what is wrong is added to `problems`."""
    found: list[Run] = []
    for path in sorted(path for path in root.rglob("seed-*.json") if _is_of_records(path)):
        name = path.relative_to(root).as_posix()
        try:
            found += _runs_of(path, Path(name).parent)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{name}: cannot be used: {said(error)}")
    return found


def with_recorded(runs: Sequence[Run], recorded: Sequence[Run]) -> list[Run]:
    """A run whose folder is there is that; of one told the same, what was measured is joined."""
    found = {run.name: run for run in runs}
    elsewhere = {Path(name).name: name for name in found if name.startswith("..")}
    stands_for: dict[str, str] = {}  # the path of a recorded run: that of the one that is there
    for kept in recorded:
        name = kept.name if kept.name in found else elsewhere.get(kept.name, kept.name)
        here = found.setdefault(name, kept)
        stands_for[str(kept.path)] = str(here.path)
        if here is not kept and comparable(here.settings) == kept.settings:
            measured = {(e.iteration, e.suite) for e in here.evaluations}
            more = [e for e in kept.evaluations if (e.iteration, e.suite) not in measured]
            joined = sorted((*here.evaluations, *more), key=lambda e: (e.iteration, e.suite))
            found[name] = replace(here, evaluations=tuple(joined))
    return [_below(run, stands_for) for run in found.values()]


def _below(run: Run, stands_for: Mapping[str, str]) -> Run:
    if run.parent is None or run.parent.run not in stands_for:
        return run
    return replace(run, parent=replace(run.parent, run=stands_for[run.parent.run]))


def _runs_of(path: Path, prefix: Path) -> Iterator[Run]:
    held = SeedRecords.read(path)
    settings = _read(path.parent / SETTINGS)["settings"]
    for name, kept in held.runs.items():
        lineage = lineage_of(kept["lineage"])
        if (parent := lineage["parent"]) is not None:
            lineage["parent"] = replace(parent, run=str(path.parent / parent.run))
        yield Run(
            path.parent / name,
            (prefix / name).as_posix(),
            **lineage,
            settings=settings[kept["settings"]],
            metrics=tuple(numbers(line) for line in kept["metrics"]),
            evaluations=tuple(evaluation_of(held.whole(e)) for e in kept["evaluations"]),
        )


def _is_of_records(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as stream:
        return FORMAT in stream.read(100)


def _read(path: Path) -> dict[str, Any]:
    held = _read_json(path)
    if held.get("format") != FORMAT:
        raise ValueError(f"{path}: format is {held.get('format')!r}; allowed is {FORMAT!r}")
    return held


def _read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _keep_settings(folder: Path, settings: Any) -> None:
    path = folder / SETTINGS
    held = _read(path) if path.exists() else {"format": FORMAT, "settings": {}}
    if hash_of(settings) not in held["settings"]:
        held["settings"][hash_of(settings)] = settings
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, _lines_of(held))


def _lines_of(held: Mapping[str, Any]) -> str:
    """JSON with a line for each run, so that a changed one is a changed line."""

    def compact(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    parts = []
    for key, value in held.items():
        if isinstance(value, Mapping) and value:
            inside = ",\n".join(f"{json.dumps(k)}:{compact(v)}" for k, v in sorted(value.items()))
            parts.append(f"{json.dumps(key)}:{{\n{inside}\n}}")
        else:
            parts.append(f"{json.dumps(key)}:{compact(value)}")
    return "{" + ",\n".join(parts) + "}\n"


def _metrics(folder: Path, evaluated: set[int]) -> Iterator[dict[str, Any]]:
    """Costs and tokens where something was measured, and where RL begins."""
    lines = list(read_metrics(folder / "metrics.jsonl"))
    rl = next((i for i, line in enumerate(lines) if any(k[:3] == "rl/" for k in line)), None)
    for number, line in enumerate(lines):
        first = number == rl or (rl is not None and number == rl - 1)
        if line["step"] in evaluated or first or number == len(lines) - 1:
            kept = {key: value for key, value in line.items() if key.startswith(WHOLE)}
            mark = [key for key in line if key[:3] == "rl/"][:1] if number == rl else []
            loss = [key for key in line if key[:5] == "loss/"][:1]
            kept |= {key: line[key] for key in (*mark, *loss)}
            yield {"step": line["step"], **_rounded(kept)}


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: float(f"{value:.{SIGNIFICANT}g}") if isinstance(value, float) else value
        for key, value in values.items()
        if value is not None
    }


def _packed(counts: Sequence[int]) -> int | str | list[int]:
    if len(set(counts)) == 1:
        return counts[0]
    if min(counts) >= 0 and max(counts) < len(DIGITS):
        return "".join(DIGITS[count] for count in counts)
    return list(counts)


def _counts_of(packed: int | str | list[int], length: int) -> list[int]:
    if isinstance(packed, int):
        return [packed] * length
    return [DIGITS.index(c) for c in packed] if isinstance(packed, str) else packed


def _ids(names: Sequence[str]) -> list[Any]:
    """Names that are numbered from 0 as [what is before the number, how many]."""
    before = names[0].removesuffix("0")
    numbered = all(name == f"{before}{i}" for i, name in enumerate(names))
    return [before, len(names)] if numbered else list(names)


def _ids_of(kept: Sequence[Any]) -> list[str]:
    if len(kept) == 2 and isinstance(kept[1], int):
        return [f"{kept[0]}{i}" for i in range(kept[1])]
    return list(kept)
