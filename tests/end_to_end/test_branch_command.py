"""`megarlx branch`: excursions of every recipe, from any iteration, in any layout."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from training_runs import ROOT, command, run, tensors, train

from megarlx.cli import main
from megarlx.training.metrics import read_metrics

TRUNK = """
[model]
family = "olmo2"
vocab_size = 400
hidden_size = 24
layers = 2
heads = 2
intermediate_size = 40
max_sequence_length = 128

[training]
steps = 8
sequences_per_step = 4
sequences_per_microbatch = 4
sequence_length = 128

[optimizer]
lr = 2e-3
warmup_steps = 2

[data]
maker = "world"
folder = "{world}"
[data.options]
documents = 300
held_out_documents = 20
prompts = 24
settings = {{ quantities = 1, steps = [1.0, 1.0], demonstrations_per_question = 2 }}

[checkpoints]
save_every_steps = 4

[logging]
log_every_steps = 1
"""
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.toml"))
PLACEMENTS = sorted((ROOT / "configs" / "recipes" / "placement").glob("*.toml"))
SMALL = (
    "rl.prompts_per_step=2",
    "rl.samples_per_prompt=2",
    "rl.max_completion_tokens=8",
    "logging.log_every_steps=1",
)


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("branch")
    config = folder / "trunk.toml"
    config.write_text(TRUNK.format(world=folder / "world"))
    assert train(config, folder / "run") == 0
    return folder / "run"


def branch(reference: str, recipe: Path, out: Path, *overrides: str, words: tuple = ()) -> int:
    settings = [word for o in overrides for word in ("--set", o)]
    return main(["branch", reference, str(recipe), "--out", str(out), *words, *settings])


def short(recipe: Path) -> list[str]:
    """Few steps of each stage, and no more of [rl] than the recipe has."""
    text = recipe.read_text()
    steps = 12 if "turns" in text else 6
    found = [f"stages.{i}.steps={steps}" for i in range(text.count("[[stages]]"))]
    if "turns" in text:
        names = re.findall(r"\[stages\.objectives\.(\w+)\]", text)
        found += [f"stages.0.objectives.{name}.turns=1" for name in names]
    return found + [s for s in SMALL if not s.startswith("rl.") or "[rl]" in text]


def bytes_of(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("recipe", [*RECIPES, *PLACEMENTS], ids=lambda path: path.stem)
def test_every_recipe_runs_and_tells_where_it_came_from(
    trunk: Path, tmp_path: Path, recipe: Path
) -> None:
    if "environment" in recipe.read_text():
        pytest.skip("an agent's recipe: its own tests run it")
    assert branch(f"{trunk}@4", recipe, tmp_path / "x", *short(recipe)) == 0
    lineage = json.loads((tmp_path / "x" / "lineage.json").read_text())
    assert lineage["parent"]["iteration"] == 4
    assert lineage["parent"]["run"] == str(trunk)
    assert lineage["trunk_tokens"] == 4 * 4 * 128
    assert lineage["recipe"] == recipe.stem
    inherit = "inherit = true" in recipe.read_text()
    assert ("pretraining: moments, data, course" in lineage["restored"]) == inherit
    last = list(read_metrics(tmp_path / "x" / "metrics.jsonl"))[-1]
    steps = 12 if "turns" in recipe.read_text() else 6
    assert last["step"] == steps * recipe.read_text().count("[[stages]]")


def test_an_excursion_that_fails_before_its_first_step_leaves_nothing_and_no_note(
    trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft, before = ROOT / "configs" / "recipes" / "sft.toml", bytes_of(trunk)
    assert branch(f"{trunk}@4", sft, tmp_path / "x" / "y", 'logging.trackers=["mlflow"]') == 1
    assert "mlflow, which is not installed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert bytes_of(trunk) == before


def test_a_parent_is_only_read_but_for_the_note_that_keeps_its_checkpoint(
    trunk: Path, tmp_path: Path
) -> None:
    sft = ROOT / "configs" / "recipes" / "sft.toml"
    before = bytes_of(trunk)
    assert branch(f"{trunk}@tokens:2K", sft, tmp_path / "one", *short(sft)) == 0
    after = bytes_of(trunk)
    new = set(after) - set(before)
    assert {k: after[k] for k in before} == before
    assert len(new) == 1
    assert new.pop().startswith("checkpoints/references/iter_00000004.")


def test_an_excursion_goes_on_where_it_was_stopped_bit_for_bit(trunk: Path, tmp_path: Path) -> None:
    recipe = ROOT / "configs" / "recipes" / "parallel.toml"
    settings = [*short(recipe), "checkpoints.save_every_steps=2"]
    assert branch(f"{trunk}@8", recipe, tmp_path / "whole", *settings) == 0
    assert branch(f"{trunk}@8", recipe, tmp_path / "parts", *settings) == 0
    for iteration in (6, 4):
        folder = tmp_path / "parts" / "checkpoints" / f"iter_{iteration:08d}"
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    assert branch(f"{trunk}@8", recipe, tmp_path / "parts", *settings) == 0
    assert tensors(tmp_path / "whole", 6) == tensors(tmp_path / "parts", 6)


def test_pretraining_that_goes_on_in_an_excursion_is_the_trunk_itself(
    trunk: Path, tmp_path: Path
) -> None:
    """Its moments, data and learning-rate course: without RL nothing differs."""
    recipe = tmp_path / "on.toml"
    recipe.write_text("[[stages]]\nsteps = 4\n[stages.objectives.pretraining]\ninherit = true\n")
    assert branch(f"{trunk}@4", recipe, tmp_path / "x") == 0
    assert tensors(tmp_path / "x", 4) == tensors(trunk, 8)


def test_an_iteration_that_was_not_saved_is_replayed_bit_for_bit(
    trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft = ROOT / "configs" / "recipes" / "sft.toml"
    assert branch(f"{trunk}@6", sft, tmp_path / "x", *short(sft)) == 1
    said = capsys.readouterr().err
    assert "iteration 6 was not saved" in said
    assert "holds 4, 8" in said
    assert "--replay would take 2 steps from iteration 4" in said
    before = bytes_of(trunk)
    assert branch(f"{trunk}@6", sft, tmp_path / "x", *short(sft), words=("--replay",)) == 0
    assert bytes_of(trunk) == before
    saved = tmp_path / "saved"
    config = saved.with_suffix(".toml")
    world = json.loads((trunk / "resolved.json").read_text())["data"]["folder"]
    config.write_text(
        TRUNK.format(world=world).replace("save_every_steps = 4", "save_every_steps = 6")
    )
    assert train(config, saved) == 0
    assert tensors(tmp_path / "x" / "replay", 6) == tensors(saved, 6)
    parent = json.loads((tmp_path / "x" / "lineage.json").read_text())["parent"]
    assert parent["iteration"] == 6


def test_an_excursion_may_have_another_layout_and_an_excursion_as_its_parent(
    trunk: Path, tmp_path: Path
) -> None:
    recipes = ROOT / "configs" / "recipes"
    sft, rl = recipes / "sft.toml", recipes / "rl.toml"
    assert branch(f"{trunk}@4", sft, tmp_path / "sft", *short(sft)) == 0
    settings = [w for s in (*short(rl), "layout.tensor=2") for w in ("--set", s)]
    words = ["branch", f"{tmp_path / 'sft'}@latest", str(rl), "--out", str(tmp_path / "rl")]
    done = run([*command_of_torchrun(2), *words, *settings])
    assert done.returncode == 0, done.stderr
    lineage = json.loads((tmp_path / "rl" / "lineage.json").read_text())
    assert lineage["parent"]["run"] == str(tmp_path / "sft")
    assert lineage["parent"]["tokens"]["pretraining"] == 4 * 4 * 128
    assert lineage["parent"]["tokens"]["sft"] > 0
    assert lineage["trunk_tokens"] == 4 * 4 * 128


def command_of_torchrun(processes: int) -> list[str]:
    whole = command(Path("x.toml"), Path("x"), processes=processes)
    return whole[: whole.index("train")]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("[training]\nseed = 1\n", "or \\[\\[stages\\]\\]"),
        (
            "[model]\nlayers = 3\n[[stages]]\nsteps = 1\n[stages.objectives.sft]\nlr = 1\n[sft]\n",
            r"\[model\] is another one",
        ),
        ("[[stages]]\nsteps = 1\n[stages.objectives.rl]\n", "rl is not known"),
        (
            "[[stages]]\nsteps = 1\n[stages.objectives.sft]\nlr = 1\ninherit = true\n[sft]\n",
            "no moments of sft",
        ),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused_with_the_reason(
    trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str, message: str
) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(recipe)
    assert branch(f"{trunk}@4", path, tmp_path / "x") != 0
    assert re.search(message, capsys.readouterr().err)
