"""What is left of finished runs when their folders are gone: one JSON file a seed.

Of each evaluation its metrics and, of suites that count, the counts of every question; of an
excursion's steps before its last, only of suites that sample or ask for chosen facts. A report
reads a folder of these files as it reads runs. settings.json beside them holds what the runs were
told, once for all seeds: a run names its settings by their hash. Counts up to 35 are written as one
character each or packed further, so that a study fits into a repository.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from base64 import b85decode, b85encode
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megarlx.data.token_files import write_atomically
from megarlx.report.runs import (
    AGENT,
    Run,
    evaluation_of,
    lineage_of,
    numbers,
    said,
    settings_of,
)
from megarlx.report.settings import comparable
from megarlx.training.metrics import read_metrics

FORMAT = "megarlx records 1"
SETTINGS = "settings.json"
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
PACKED = ":"  # before counts as bytes, compressed by zlib, in base 85
BITS = b"\xff"  # before bits; no count is so large
COUNTS = ("samples", "correct", "marked", "marked_correct")  # of an item
SIGNIFICANT = 5  # digits of a metric
# Standard errors that follow from the counts, or that nothing asks for.
LEFT_OUT = ("pass_at_", "accuracy", "informative_groups", "truncated", "probability_told", "nll")
ON_THE_WAY = ("pass_at_k", AGENT)  # kinds that are kept of the steps before a run's last
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
        if "sum" in lineage:
            kept["sum"] = {"terms": [_term(term) for term in lineage["sum"]["terms"]]}
        settings = comparable(settings_of(_read_json(folder / "resolved.json")))
        _keep_settings(self.path.parent, settings)
        found = [_read_json(file) for file in (folder / "evaluations").glob("iter_*.json")]
        last = max((e["iteration"] for e in found), default=0)
        evaluations = [
            self._compact(e)
            for e in found
            if parent is None or e["iteration"] == last or _is_kept_on_the_way(e)
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
        kept["metrics"] = _rounded(evaluation["metrics"])
        errors = evaluation.get("standard_errors") or {}
        if own := {key: value for key, value in errors.items() if not key.startswith(LEFT_OUT)}:
            kept["standard_errors"] = _rounded(own)
        items = evaluation["items"]
        kept["questions"] = self._asked(evaluation)
        if items and "correct" in items[0]:
            columns = {key: [int(i[key]) for i in items] for key in COUNTS if key in items[0]}
            if columns.get("marked_correct") == columns["correct"]:
                columns["marked_correct"] = []
            kept["counts"] = {key: _packed(values) for key, values in columns.items()}
        return kept

    def _asked(self, evaluation: Mapping[str, Any]) -> str:
        """The name of these questions, asked in this way, in the file's table of them."""
        items = evaluation["items"]
        asked: dict[str, Any] = {"ids": []}
        if items and "correct" in items[0]:
            asked["ids"] = _ids([str(item["id"]) for item in items])
            if "group" in items[0]:
                names = sorted({item["group"] for item in items})
                places = _packed([names.index(item["group"]) for item in items])
                asked["groups"] = {"names": names, "of": places}
        if template := (evaluation.get("settings") or {}).get("template"):
            asked["template"] = template
        if guessing := evaluation.get("guessing"):
            asked["guessing"] = _rounded(guessing)
        name = hash_of(asked)[:8]
        self.questions.setdefault(name, asked)
        return name

    def whole(self, kept: Mapping[str, Any]) -> dict[str, Any]:
        """As the file of an evaluation has it."""
        asked = self.questions[kept["questions"]]
        items: list[dict[str, Any]] = [{"id": name} for name in _ids_of(asked["ids"])]
        for key, packed in kept.get("counts", {}).items():
            for item, count in zip(items, _counts_of(packed, len(items)), strict=False):
                item[key] = count
            if not packed and not isinstance(packed, int):
                for item in items:
                    item[key] = item["correct"]
        if "groups" in asked:
            names = asked["groups"]["names"]
            for item, at in zip(items, _counts_of(asked["groups"]["of"], len(items)), strict=True):
                item["group"] = names[at]
        how = {"settings": {"template": asked.get("template")}, "guessing": asked.get("guessing")}
        return {"format": 1, **kept, **how, "items": items}


def _is_kept_on_the_way(evaluation: Mapping[str, Any]) -> bool:
    """Also lookups of chosen facts, which are few numbers."""
    suite = (evaluation.get("settings") or {}).get("suite") or {}
    chosen = evaluation["kind"] == "lookups" and "facts" in (suite.get("options") or {})
    return chosen or evaluation["kind"] in ON_THE_WAY


def _term(term: Mapping[str, Any]) -> dict[str, Any]:
    plus = term["plus"]
    told = {"run": Path(plus["run"]).name, "recipe": plus["recipe"]}
    return {"weight": term["weight"], "plus": told}


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
    held: dict[str, Any] = {"format": FORMAT, "settings": {}}
    if path.exists():
        held = _read(path)
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
    spent = [i for i, line in enumerate(lines) if any(k.startswith(WHOLE) for k in line)]
    ends = [bisect_right(spent, i, key=lambda n: lines[n]["step"]) for i in evaluated]
    last_before = {spent[end - 1] for end in (*ends, len(spent)) if end}
    around_rl = set() if rl is None else {rl - 1, rl}
    for number in sorted(n for n in last_before | around_rl | {len(lines) - 1} if n >= 0):
        line = lines[number]
        kept = {key: value for key, value in line.items() if key.startswith(WHOLE)}
        mark = [key for key in line if key[:3] == "rl/"][:1] if number == rl else []
        loss = [key for key in line if key[:5] == "loss/"][:1]
        kept |= {key: line[key] for key in (*mark, *loss)}
        if kept or number == len(lines) - 1:
            yield {"step": line["step"], **_rounded(kept)}


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: float(f"{value:.{SIGNIFICANT}g}") if isinstance(value, float) else value
        for key, value in values.items()
        if value is not None
    }


def _packed(counts: Sequence[int]) -> int | str | list[int]:
    """One number where all are alike, else the shorter of a character each and of these packed;
    a list where a count has no character."""
    if len(set(counts)) == 1:
        return counts[0]
    if not counts or min(counts) < 0 or max(counts) >= len(DIGITS):
        return list(counts)
    plain = "".join(DIGITS[count] for count in counts)
    packed = PACKED + b85encode(zlib.compress(_in_bytes(counts), 9)).decode()
    return packed if len(packed) < len(plain) else plain


def _in_bytes(counts: Sequence[int]) -> bytes:
    """Bits where all are 0 or 1."""
    if max(counts) > 1:
        return bytes(counts)
    bits = "".join(map(str, counts))
    return BITS + int(bits, 2).to_bytes(-(-len(counts) // 8), "big")


def _counts_of(packed: int | str | list[int], length: int) -> list[int]:
    if isinstance(packed, int):
        return [packed] * length
    if isinstance(packed, list):
        return packed
    if not packed.startswith(PACKED):
        return [DIGITS.index(character) for character in packed]
    held = zlib.decompress(b85decode(packed.removeprefix(PACKED)))
    if not held.startswith(BITS):
        return list(held)
    return [int(bit) for bit in f"{int.from_bytes(held.removeprefix(BITS), 'big'):0{length}b}"]


def _ids(names: Sequence[str]) -> list[Any]:
    """Names that are numbered from 0 as [what is before the number, how many]."""
    before = names[0].removesuffix("0")
    numbered = all(name == f"{before}{i}" for i, name in enumerate(names))
    return [before, len(names)] if numbered else list(names)


def _ids_of(kept: Sequence[Any]) -> list[str]:
    if len(kept) == 2 and isinstance(kept[1], int):
        return [f"{kept[0]}{i}" for i in range(kept[1])]
    return list(kept)
