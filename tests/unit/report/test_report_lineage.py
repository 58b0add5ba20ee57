"""What an excursion is compared with, and which runs are trunks."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from fake_sweep import Outcome, Sweep
from rich.console import Console

from megarlx.report.study import BASE, Study
from megarlx.report.tree import lineage

ONE = (2_000_000,)


def small(root: Path, **settings: Any) -> Sweep:
    return Sweep(root, **{"checkpoints": ONE, "questions": 40, "tests": 20} | settings)


def write(path: Path, **values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def change(path: Path, **values: Any) -> None:
    write(path, **(json.loads(path.read_text()) | values))


def test_an_excursion_is_compared_with_what_it_started_from(tmp_path: Path) -> None:
    sweep = small(tmp_path, seeds=(0,))
    trunk = sweep.trunk(0)
    sft = sweep.excursion(trunk, "sft", ONE[0], 0)
    # Branched half-way, where it had been measured, and at its end.
    sweep.evaluate(sft, 30, ONE[0], Outcome(0.11, 0.5), 0)
    for name, iteration in (("half", 30), ("end", 60)):
        run = sweep.excursion(sft, "rl", ONE[0], 0, name=name)
        path = run / "lineage.json"
        parent = json.loads(path.read_text())["parent"] | {"iteration": iteration}
        change(path, parent=parent)
    study = Study.of(tmp_path)
    bases = {cell.run.name: study.base_of(cell) for cell in study.cells}
    for name, iteration in (("half", 30), ("end", 60)):
        base = bases[f"excursions/{name}"]
        assert base is not None
        assert base.run.name == "excursions/sft-2000000-seed0"
        assert base.headline is not None
        assert base.headline.iteration == iteration
    of_sft = bases["excursions/sft-2000000-seed0"]
    assert of_sft is not None
    assert (of_sft.recipe, of_sft.run.name) == (BASE, "trunks/seed0")


def test_checkpoints_of_the_same_tokens_are_the_bases_of_their_own_excursions(
    tmp_path: Path,
) -> None:
    """As of converted revisions that were given no tokens."""
    sweep = small(tmp_path, seeds=(0,))
    trunk = sweep.trunk(0)
    sweep.evaluate(trunk, 2500, ONE[0], Outcome(0.2, 0.5), 0)
    for name, iteration in (("early", 2000), ("late", 2500)):
        path = sweep.excursion(trunk, "rl", ONE[0], 0, name=name) / "lineage.json"
        parent = json.loads(path.read_text())["parent"] | {"iteration": iteration}
        change(path, parent=parent)
    study = Study.of(tmp_path)
    for name, iteration in (("early", 2000), ("late", 2500)):
        (cell,) = (c for c in study.cells if c.run.name == f"excursions/{name}")
        base = study.base_of(cell)
        assert base is not None
        assert (base.iteration, base.label) == (iteration, f"base (step {iteration:,})")


def continued(sweep: Sweep, tokens: dict[str, int], *objectives: str) -> Path:
    """A run that goes on from a converted model, whose pre-training was somebody else's."""
    base = sweep.root / "runs" / "base"
    write(base / "lineage.json", parent=None, recipe=None, seed=0, trunk_tokens=0)
    sweep.evaluate(base, 0, 0, Outcome(0.02, 0.3), 0)
    run = sweep.root / "runs" / "cpt"
    parent = {"run": str(base), "iteration": 0, "digest": "", "trunk_tokens": 0, "tokens": tokens}
    write(run / "lineage.json", parent=parent, recipe="cpt", seed=0, trunk_tokens=0)
    stages = [{"steps": 1000, "objectives": {name: {} for name in objectives}}]
    write(run / "resolved.json", stages=stages)
    sweep.evaluate(run, 2000, ONE[0], Outcome(0.1, 0.5), 0)
    return run


def test_pre_training_that_goes_on_is_a_trunk_with_excursions_of_its_own(tmp_path: Path) -> None:
    sweep = small(tmp_path, seeds=(0,))
    run = continued(sweep, {"pretraining": 0, "sft": 0, "rl": 0}, "pretraining")
    sweep.excursion(run, "rl", ONE[0], 0)
    sweep.excursion(sweep.root / "runs" / "base", "rl", ONE[0], 0, name="direct")
    path = tmp_path / "excursions" / "direct" / "lineage.json"
    parent = json.loads(path.read_text())["parent"] | {"iteration": 0, "trunk_tokens": 0}
    change(path, parent=parent, trunk_tokens=0)
    study = Study.of(tmp_path)
    assert [trunk.name for trunk in study.trunks] == ["runs/base", "runs/cpt"]
    assert len(study.variants) == 1
    cells = [(c.label, c.checkpoint_tokens) for c in study.cells]
    assert cells == [
        ("base", 0),
        ("rl", 0),
        ("base (after cpt)", ONE[0]),
        ("rl (after cpt)", ONE[0]),
    ]
    pairs = study.pairs("rl", BASE)
    assert [(c.run.name, b.run.name) for c, b in pairs] == [
        ("excursions/direct", "runs/base"),
        ("excursions/rl-2000000-seed0", "runs/cpt"),
    ]
    shown = Console(width=200, file=io.StringIO())
    shown.print(lineage(study))
    drawn = shown.file.getvalue()  # type: ignore[attr-defined]
    for run_of in ("runs/base", "runs/cpt", "excursions/rl-2000000-seed0", "excursions/direct"):
        assert drawn.count(run_of) == 1


@pytest.mark.parametrize(
    ("tokens", "objectives"),
    [
        ({"pretraining": 9, "rl": 4}, ["pretraining"]),
        ({"pretraining": 9}, ["pretraining", "rl"]),
        ({"pretraining": 9}, ["sft"]),
    ],
    ids=str,
)
def test_what_learned_more_than_pre_training_is_no_trunk(
    tmp_path: Path, tokens: dict[str, int], objectives: list[str]
) -> None:
    continued(small(tmp_path, seeds=(0,)), tokens, *objectives)
    study = Study.of(tmp_path)
    assert [run.name for run in study.excursions] == ["runs/cpt"]


def test_a_run_that_was_measured_by_other_suites_is_not_said_to_be_measured_by_none(
    tmp_path: Path,
) -> None:
    trunk = small(tmp_path, seeds=(0,)).trunk(0)
    Sweep(tmp_path / "more", seeds=(1,), checkpoints=ONE).trunk(1)
    for result in trunk.glob("evaluations/*.math.json"):
        result.unlink()
    screen = Console(file=io.StringIO(), width=160)
    screen.print(lineage(Study.of(tmp_path)))
    told = screen.file.getvalue()
    assert "measured by facts-choice, facts-cloze, general-text, not by math" in told
    assert "not evaluated" not in told


def test_a_converted_model_has_no_steps_to_take(tmp_path: Path) -> None:
    trunk = small(tmp_path, seeds=(0,)).trunk(0)
    for log in trunk.glob("metrics.jsonl"):
        log.unlink()
    change(trunk / "lineage.json", converted={"0": {"source": "models/theirs", "tokens": 0}})
    screen = Console(file=io.StringIO(), width=120)
    screen.print(lineage(Study.of(tmp_path)))
    told = screen.file.getvalue()
    assert "trunks/seed0  converted  seed 0" in told
    assert "step 0 of" not in told
