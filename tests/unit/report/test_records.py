"""Records tell a report what the folders of the runs told."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_sweep import Sweep

from megarlx.report.claims import judge_all
from megarlx.report.record_files import FORMAT
from megarlx.report.records import SeedRecords
from megarlx.report.study import Study
from megarlx.report.summary import summary

SMALL: dict[str, Any] = {"checkpoints": (1_000_000, 2_000_000), "questions": 40, "tests": 60}


def recorded(root: Path, folder: Path) -> Path:
    for run in sorted(path.parent for path in root.rglob("lineage.json")):
        seed = json.loads((run / "lineage.json").read_text())["seed"]
        records = SeedRecords.at(folder, seed)
        records.add(run)
        records.write()
    return folder


def told(study: Study) -> Any:
    """Without the names of runs, whose folders differ."""
    found = summary(study, judge_all(study))
    for predicate in found["predicates"].values():
        predicate["evidence"].pop("rl_began_with", None)
        for one in predicate["evidence"]["comparisons"]:
            one["by_trunk"] = [*one["by_trunk"].values()]
            one["left_out"] = len(one["left_out"])
    return found


def near(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(near(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(near, one, other))
    return bool(one == pytest.approx(other, rel=1e-4)) if isinstance(one, float) else one == other


def test_a_report_of_records_is_that_of_the_runs(tmp_path: Path) -> None:
    root = Sweep(tmp_path / "runs", **SMALL).write()
    folder = recorded(root, tmp_path / "records")
    assert sorted(path.name for path in folder.iterdir()) == [
        "seed-0.json",
        "seed-1.json",
        "settings.json",
    ]
    runs, records = told(Study.of(root)), told(Study.of(folder))
    assert near(runs, records)
    assert runs["settings_hash"] == records["settings_hash"]
    assert not Study.of(folder).missing()


def test_records_fill_in_the_runs_that_are_not_there(tmp_path: Path) -> None:
    root = Sweep(tmp_path / "runs", **SMALL).write(["rl", "sft"])
    whole = told(Study.of(root))
    flat = tmp_path / "flat"  # where names of folders are those of records
    flat.mkdir()
    for run in [path.parent for path in root.rglob("lineage.json")]:
        run.rename(flat / run.name)
    folder = recorded(flat, tmp_path / "records")
    for gone in ("seed0", "rl-1000000-seed1"):
        shutil.rmtree(flat / gone)
    study = Study.of(flat, folder)
    assert near(told(study), whole)
    assert len({run.name for run in study.runs}) == len(study.runs)


def test_records_of_other_settings_add_nothing_to_a_run(tmp_path: Path) -> None:
    run = Sweep(tmp_path / "runs", **SMALL).trunk(0)
    folder = recorded(run, tmp_path / "records")
    (evaluation,) = (run / "evaluations").glob("*1000.math.json")
    evaluation.unlink()
    joined = Study.of(run.parent, folder).runs[0]
    assert 1000 in {e.iteration for e in joined.course("math")}
    resolved = json.loads((run / "resolved.json").read_text())
    resolved["training"]["steps"] = 7
    (run / "resolved.json").write_text(json.dumps(resolved))
    assert {e.iteration for e in Study.of(run.parent, folder).runs[0].course("math")} == {2000}


def test_counts_of_any_size_come_back(tmp_path: Path) -> None:
    run = Sweep(tmp_path / "runs", **SMALL).trunk(0)
    (path,) = (run / "evaluations").glob("*1000.math.json")
    held = json.loads(path.read_text())
    names = [f"q{i}" for i in range(3)]
    for counts in ([0, 3, 35], [0, 36, 64], [5, 5, 5], [0, 1, 0], [1, 0, 0]):
        for right in (counts, [0, 0, 0]):
            held["items"] = [
                {"id": n, "samples": 64, "correct": c, "marked_correct": r, "group": g}
                for n, c, r, g in zip(names, counts, right, ("easy", "hard", "easy"), strict=True)
            ]
            path.write_text(json.dumps(held))
            (found,) = Study.of(recorded(run, tmp_path / f"{counts}{right}")).runs
            (first, _) = found.course("math")
            assert list(first.items) == held["items"]
            assert first.groups == {"q0": "easy", "q1": "hard", "q2": "easy"}


def test_damaged_records_are_named(tmp_path: Path) -> None:
    folder = recorded(Sweep(tmp_path / "runs", **SMALL).trunk(0), tmp_path / "records")
    (folder / "seed-3.json").write_text(f'{{"format": "{FORMAT}"}}')
    (problem,) = Study.of(folder).problems
    assert problem == "seed-3.json: cannot be used: lacks 'seed'"
