"""`make study` on tiny runs: one trunk, one checkpoint of it, some recipes, the report; and again
from its records alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from short_runs import MATH, RL, TRUNK, table
from training_runs import ROOT

from megarlx.cli import main

MEASURED = {"evaluation.at_end": "true", "evaluation.every_steps": "40"}
SHORT = {
    "set": table({**TRUNK, **MATH, "evaluation.suites.0.group_size": "2"}),
    "evaluate": '["8"]',
    "excursions.0.checkpoints": '["8"]',
    "excursions.0.set": table({**RL, **MEASURED, "stages.0.steps": "6"}),
    "excursions.1.recipes": '["configs/recipes/sft.toml"]',
    "excursions.1.checkpoints": '["8"]',
    "excursions.1.set": table({**MEASURED, "stages.0.steps": "6"}),
}
RECIPES = {"base", "rl", "sft", "sft_then_rl"}


def test_the_study_makes_its_report_and_again_without_a_run_made_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    words = ["demo", "--study", "--seeds", "5", "--out", "runs/study", "--set", "records=kept"]
    for key, value in SHORT.items():
        words += ["--set", f"{key}={value}"]
    assert main(words) == 0
    summary = Path("runs/study/report/summary.json")
    first = json.loads(summary.read_text())
    assert {(one["recipe"], one["seed"]) for one in first["results"]} == {(r, 5) for r in RECIPES}
    assert set(first["predicates"]) == {f"P{n}" for n in range(1, 16)}
    assert first["predicates"]["P14"]["verdict"] == "undetermined"  # one trunk says nothing of it

    made = {path: path.stat().st_mtime_ns for path in Path("runs/study").glob("*/metrics.jsonl")}
    assert len(made) == len(RECIPES)  # the trunk is the base
    summary.unlink()
    assert main(words) == 0
    assert json.loads(summary.read_text()) == first
    assert {path: path.stat().st_mtime_ns for path in made} == made

    shutil.rmtree("runs")
    assert main(words) == 0
    assert not list(Path("runs/study").glob("*/metrics.jsonl"))  # nothing was run
    again = json.loads(summary.read_text())
    assert again["settings_hash"] == first["settings_hash"]
    assert len(again["results"]) == len(first["results"])
    for one, other in zip(again["results"], first["results"], strict=True):
        told = {key: one[key] for key in ("recipe", "seed", "checkpoint_tokens")}
        numbers = {key: value for key, value in one.items() if key not in told}
        assert other == told | {k: v and pytest.approx(v, rel=1e-5) for k, v in numbers.items()}
