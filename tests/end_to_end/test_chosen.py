"""What a run computes with is said when it begins, and kept when it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_runs import train, write_config

from megarlx.cli import main
from megarlx.run import assemble as assembling
from megarlx.run.directory import RunError

RECIPE = """
[[stages]]
steps = 2
[stages.objectives.pretraining]
lr = 1e-3
"""


def resolved(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "resolved.json").read_text())
    return found


def test_a_run_says_before_its_first_step_what_it_computes_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = write_config(tmp_path, tmp_path / "world"), tmp_path / "run"
    assert train(config, out, "training.steps=2", "training.attention=sdpa") == 0
    before, _, _ = capsys.readouterr().out.partition("\nstep ")
    assert [line for line in before.splitlines() if line.startswith("training.")] == [
        "training.precision = fp32: this is a CPU",
        "training.layers = torch: Transformer Engine runs on GPUs alone",
    ]
    saved = resolved(out)
    assert saved["training"]["precision"] == "fp32"
    assert saved["chosen"]["training.precision"] == "fp32: this is a CPU"
    assert "training.attention" not in saved["chosen"]  # it was given


def test_all_that_goes_on_from_a_run_computes_in_its_precision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if it had begun on a GPU: its own later steps, an excursion, generation."""
    config, out = write_config(tmp_path, tmp_path / "world"), tmp_path / "run"
    assert train(config, out, "training.steps=2", "training.precision=bf16") == 0
    capsys.readouterr()
    assert train(config, out, "training.steps=4") == 0
    said = capsys.readouterr().out
    assert "training.precision = bf16: the run began with it" in said
    assert "going on from" in said
    assert resolved(out)["training"]["precision"] == "bf16"

    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    branched = tmp_path / "branched"
    assert main(["branch", str(out), str(recipe), "--out", str(branched)]) == 0
    assert resolved(branched)["training"]["precision"] == "bf16"
    capsys.readouterr()

    asked = [
        "generate",
        str(out),
        "--prompt",
        "tom has 9 pears .",
        "--raw",
        "--max-new-tokens",
        "3",
    ]
    asked += ["--temperature", "0", "--logprobs"]
    texts = []
    for precision in ([], ["bf16"], ["fp32"]):
        words = [part for one in precision for part in ("--set", f"training.precision={one}")]
        assert main([*asked, *words]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]

    capsys.readouterr()
    assert train(config, out, "training.steps=6", "training.precision=fp32") == 1
    assert 'training.precision: was "bf16", is "fp32"' in capsys.readouterr().err


def test_ranks_that_would_compute_with_different_things_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, tmp_path / "world")
    monkeypatch.setattr(
        assembling,
        "gather_values",
        lambda mine, group: [mine, {**mine, "training.layers": "te"}],
    )
    assert train(config, tmp_path / "run") == 1
    with pytest.raises(RunError, match=r"training\.layers became torch on rank 0 and te on rank 1"):
        assembling._check_alike(
            {"training.layers": assembling.Choice("torch", "")},
            assembling.Mesh.alone(),
        )
