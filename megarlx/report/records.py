"""What is left of finished runs when their folders are gone: one JSON file a seed.

Of each evaluation its metrics and, of suites that count, the counts of every question; of an
excursion's steps before its last, only of suites that sample, unless suites are named. A report
reads a folder of these files as it reads runs. settings.json beside them holds what the runs were
told, each section once for all seeds: a run names its settings by their hash. What a suite measured
in a run is written as columns, their names once a file, and counts up to 35 as one character each
or packed further, so that a study fits into a repository.

Letters: e evaluations of the same questions, q questions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megarlx.data.token_files import write_atomically
from megarlx.evaluation import form
from megarlx.evaluation.pass_at_k import Pool
from megarlx.report.packed_counts import counts_of, ids_in_short, ids_of, packed
from megarlx.report.record_files import (
    FORMAT,
    SHORT,
    hash_of,
    is_of_records,
    keep_settings,
    kept_settings,
    lines_of,
    read,
    read_json,
)
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

COUNTS = ("samples", "correct", "marked", "marked_correct")  # of an item
SIGNIFICANT = 5  # digits of a metric
FORM = ("marked", "right_of_marked")  # metrics that follow from counts too
# Standard errors that follow from the counts, or that nothing asks for.
LEFT_OUT = ("pass_at_", "accuracy", "informative_groups", "truncated", "probability_told", "nll")
ON_THE_WAY = ("pass_at_k", AGENT)  # kinds that are kept of the steps before a run's last
WHOLE = ("cost/", "data/")  # prefixes of metrics that are kept
LINEAGE = ("recipe", "seed", "trunk_tokens", "composition")


@dataclass
class SeedRecords:
    """The file of one seed: `done` has the hash of each finished job's settings."""

    path: Path
    seed: int
    done: dict[str, str] = field(default_factory=dict)
    questions: dict[str, Any] = field(default_factory=dict)  # and how they were asked
    names: dict[str, list[str]] = field(default_factory=dict)  # of columns
    runs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def at(cls, folder: Path, seed: int) -> SeedRecords:
        path = folder / f"seed-{seed}.json"
        return cls.read(path) if path.exists() else cls(path, seed)

    @classmethod
    def read(cls, path: Path) -> SeedRecords:
        held = read(path)
        tables = (held[key] for key in ("done", "questions", "names", "runs"))
        return cls(path, held["seed"], *tables)

    def add(self, folder: Path, suites: Sequence[str] = ()) -> None:
        """What the files of a run hold, of suites by name at every step, if any are given;
        evaluations of a step that are there already stay."""
        name = folder.name
        lineage = read_json(folder / "lineage.json")
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
        settings = comparable(settings_of(read_json(folder / "resolved.json")))
        found = [read_json(file) for file in (folder / "evaluations").glob("iter_*.json")]
        last = max((e["iteration"] for e in found), default=0)
        evaluations = [
            e
            for e in found
            if (
                e["suite"] in suites
                if suites
                else parent is None or e["iteration"] == last or e["kind"] in ON_THE_WAY
            )
        ]
        before = self.evaluations(name) if name in self.runs else []
        there = {(e["iteration"], e["suite"]) for e in evaluations}
        evaluations += [e for e in before if (e["iteration"], e["suite"]) not in there]
        metrics = _metrics(folder, {e["iteration"] for e in evaluations})
        self.runs[name] = {
            "lineage": kept,
            "settings": keep_settings(self.path.parent, settings),
            "metrics": self._columns(list(metrics)),
        } | self._compact(evaluations)

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        held = {"format": FORMAT, "seed": self.seed, "done": self.done}
        held |= {"questions": self.questions, "names": self.names, "runs": self.runs}
        write_atomically(self.path, lines_of(held))

    def _compact(self, evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Steps and tokens at which several suites measured, and of each suite that was asked the
        same questions a column of what it measured."""
        alike: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
        for e in sorted(evaluations, key=lambda e: (e["suite"], e["iteration"])):
            counted = [key for key in COUNTS if e["items"] and key in e["items"][0]]
            ks = [key for key in e["metrics"] if e["kind"] == "pass_at_k" and _is_k(key)]
            alike.setdefault((self._asked(e, ks), " ".join(counted)), []).append(e)
        kept, at = [], list[Any]()
        for (asked, counts), found in alike.items():
            place = [[e[key] for e in found] for key in ("iteration", "trunk_tokens")]
            at += [place] if place not in at else []
            measured = self._measured(found, counts.split(), self.questions[asked])
            kept.append({"questions": asked, "at": at.index(place)} | measured)
        return {"at": at, "evaluations": kept}

    def _asked(self, evaluation: Mapping[str, Any], ks: Sequence[str]) -> str:
        """The name of these questions, asked in this way, in the file's table of them."""
        items = evaluation["items"]
        asked: dict[str, Any] = {key: evaluation[key] for key in ("suite", "kind")}
        asked |= {"ids": []} | ({"ks": ks} if ks else {})
        if items and "correct" in items[0]:
            asked["ids"] = ids_in_short([str(item["id"]) for item in items])
            if "group" in items[0]:
                names = sorted({item["group"] for item in items})
                places = packed([names.index(item["group"]) for item in items])
                asked["groups"] = {"names": names, "of": places}
        if template := (evaluation.get("settings") or {}).get("template"):
            asked["template"] = template
        if guessing := evaluation.get("guessing"):
            asked["guessing"] = _rounded(guessing)
        name = hash_of(asked)[:SHORT]
        self.questions.setdefault(name, asked)
        return name

    def evaluations(self, name: str) -> list[dict[str, Any]]:
        """Of a run, by iteration, as their files have them."""
        run = self.runs[name]
        found = [e for kept in run["evaluations"] for e in self._whole(kept, run["at"])]
        return sorted(found, key=lambda e: (e["iteration"], e["suite"]))

    def _whole(self, kept: Mapping[str, Any], at_steps: Sequence[Any]) -> Iterator[dict[str, Any]]:
        asked = self.questions[kept["questions"]]
        ids, how = ids_of(asked["ids"]), {"settings": {"template": asked.get("template")}}
        groups = asked.get("groups")
        of_ids = groups and counts_of(groups["of"], len(ids))
        iterations, trunk_tokens = at_steps[kept["at"]]
        places = range(len(iterations))
        counts = {
            key: counts_of(values, len(ids) * len(places))
            for key, values in kept.get("counts", {}).items()
        }
        measured: list[list[dict[str, Any]]] = [
            self.lines(kept[key]) if key in kept else [{} for _ in places]
            for key in ("metrics", "standard_errors")
        ]
        for at in places:
            items: list[dict[str, Any]] = [{"id": name} for name in ids]
            for q, item in enumerate(items):
                for key, values in counts.items():
                    # Without values of its own it is what is correct.
                    item[key] = (values or counts["correct"])[q * len(places) + at]
                if groups:
                    item["group"] = groups["names"][of_ids[q]]
            metrics, errors = _of_counts(asked.get("ks", ()), items)
            yield {
                "format": 1,
                **{key: asked[key] for key in ("suite", "kind")},
                "iteration": iterations[at],
                "trunk_tokens": trunk_tokens[at],
                "metrics": metrics | measured[0][at],
                "standard_errors": errors | measured[1][at],
                **how,
                "guessing": asked.get("guessing"),
                "items": items,
            }

    def _measured(
        self,
        evaluations: Sequence[Mapping[str, Any]],
        counted: Sequence[str],
        asked: Mapping[str, Any],
    ) -> dict[str, Any]:
        """What e evaluations of the same questions measured; counts are [q, e]. Metrics and
        standard errors that follow from counts are left out."""
        kept: dict[str, Any] = {}
        follow = {*asked["ks"], *FORM} if "ks" in asked else set()
        for name, known in (("metrics", ()), ("standard_errors", LEFT_OUT)):
            found = [(e.get(name) or {}).items() for e in evaluations]
            lines = [_rounded({k: v for k, v in x if not k.startswith(known)}) for x in found]
            columns = self._columns(
                [{k: v for k, v in x.items() if k not in follow} for x in lines]
            )
            kept |= {name: columns} if len(columns) > 1 else {}
        if "correct" in counted:
            of_questions = list(zip(*(e["items"] for e in evaluations), strict=True))
            counts = {
                key: [int(i[key]) for items in of_questions for i in items] for key in counted
            }
            if counts.get("marked_correct") == counts["correct"]:
                counts["marked_correct"] = []
            kept["counts"] = {key: packed(values) for key, values in counts.items()}
        return kept

    def _columns(self, lines: Sequence[Mapping[str, Any]]) -> list[Any]:
        """The name of the columns' names, and each key's values in the lines; None where it has
        none."""
        keys = list(dict.fromkeys(key for line in lines for key in line))
        name = hash_of(keys)[:SHORT]
        if keys:
            self.names.setdefault(name, keys)
        return [name, *([line.get(key) for line in lines] for key in keys)]

    def lines(self, columns: Sequence[Any]) -> list[dict[str, Any]]:
        keys, values = self.names.get(columns[0], []), columns[1:]
        return [
            {key: value for key, value in zip(keys, line, strict=True) if value is not None}
            for line in zip(*values, strict=True)
        ]


def _is_k(metric: str) -> bool:
    return metric.startswith("pass_at_")


def _of_counts(
    ks: Sequence[str], items: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, float], dict[str, float]]:
    """The metrics that follow from items, and their standard errors."""
    if not ks:
        return {}, {}
    pool = Pool(tuple(i["samples"] for i in items), tuple(i["correct"] for i in items))
    metrics = {key: pool.estimate(int(key.removeprefix("pass_at_"))).mean for key in ks}
    if "marked" not in items[0]:
        return metrics, {}
    of_form, errors = form.summary(items)
    return metrics | of_form, errors


def _term(term: Mapping[str, Any]) -> dict[str, Any]:
    plus = term["plus"]
    told = {"run": Path(plus["run"]).name, "recipe": plus["recipe"]}
    return {"weight": term["weight"], "plus": told}


def runs_of_records(root: Path, problems: list[str]) -> list[Run]:
    """Those that the files below a folder tell of; what is wrong is added to `problems`."""
    found: list[Run] = []
    for path in sorted(path for path in root.rglob("seed-*.json") if is_of_records(path)):
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
    settings = kept_settings(path.parent)
    for name, kept in held.runs.items():
        lineage = lineage_of(kept["lineage"])
        if (parent := lineage["parent"]) is not None:
            lineage["parent"] = replace(parent, run=str(path.parent / parent.run))
        yield Run(
            path.parent / name,
            (prefix / name).as_posix(),
            **lineage,
            settings=settings[kept["settings"]],
            metrics=tuple(numbers(line) for line in held.lines(kept["metrics"])),
            evaluations=tuple(evaluation_of(e) for e in held.evaluations(name)),
        )


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
