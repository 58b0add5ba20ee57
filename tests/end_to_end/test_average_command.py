"""`checkpoints.average_decay`, and what reads `--weights average`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import ROOT, tool, train

import megarlx
from megarlx.checkpoint import AVERAGE, CheckpointError
from megarlx.cli import main
from megarlx.hf.sources import CheckpointSource
from megarlx.hf.trunk import find_checkpoint

SETTINGS = ("training.steps=4", "checkpoints.save_every_steps=2", "checkpoints.average_decay=0.5")
SUITES = '[[suites]]\nname = "stories"\nkind = "perplexity"\nmade = "stories"\nquestions = 4\n'
RECIPE = """
[[stages]]
steps = 1
[stages.objectives.pretraining]
lr = 1e-9
"""


@pytest.fixture(scope="module")
def runs(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("average")
    assert train(config, folder / "with", *SETTINGS) == 0
    assert train(config, folder / "without", "training.steps=2") == 0
    (folder / "suites.toml").write_text(SUITES)
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


def weights(run: Path, which: str) -> torch.Tensor:
    with megarlx.open(str(run), weights=which) as opened:  # type: ignore[arg-type]
        return opened.model.data_parallel.weights.clone()


def test_open_evaluate_generate_export_and_branch_read_the_average(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs / "with"
    last, average = weights(run, "last"), weights(run, "average")
    assert not torch.equal(last, average)
    evaluate = ["evaluate", str(run), "--config", str(runs / "suites.toml")]
    assert main(evaluate) == 0
    assert main([*evaluate, "--weights", "average"]) == 0
    results = {
        path.name: json.loads(path.read_text())["metrics"]
        for path in (run / "evaluations").glob("*.stories*.json")
    }
    assert set(results) == {"iter_00000004.stories.json", "iter_00000004.stories_average.json"}
    assert len({json.dumps(metrics) for metrics in results.values()}) == 2
    said = ["generate", str(run), "--prompt", "ann has 7 books", "--max-new-tokens", "4"]
    assert main([*said, "--weights", "average", "--temperature", "0"]) == 0
    convert = ["--from", "megarlx", "--to", "hf", str(run), str(tmp_path / "hf"), "--quiet"]
    assert tool("convert_checkpoint").main([*convert, "--weights", "average"]) == 0
    exported = load_file(tmp_path / "hf" / "model.safetensors")["model.embed_tokens.weight"]
    source = CheckpointSource(find_checkpoint(str(run)))
    shape = source.shapes["embedding.weight"]
    assert torch.equal(exported, source.read(f"{AVERAGE}embedding.weight", (0, 0), shape))
    branch = ["branch", str(run), str(runs / "recipe.toml"), "--out", str(tmp_path / "x")]
    assert main([*branch, "--weights", "average"]) == 0
    torch.testing.assert_close(weights(tmp_path / "x", "last"), average, rtol=0, atol=1e-7)
    lineage = json.loads((tmp_path / "x" / "lineage.json").read_text())
    assert lineage["parent"]["weights"] == "average"
    capsys.readouterr()
    assert main(branch) == 1  # of the last weights: another excursion
    assert "weights average" in capsys.readouterr().err


def test_an_average_that_is_not_kept_is_refused_by_all_that_could_read_it(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, average = str(runs / "without"), ["--weights", "average"]
    commands = (
        ["evaluate", run, "--config", str(runs / "suites.toml")],
        ["generate", run, "--prompt", "ann has 7 books"],
        ["branch", run, str(runs / "recipe.toml"), "--out", str(tmp_path / "x")],
    )
    for words in commands:
        assert main([*words, *average]) == 1
        assert "keeps no average of the weights" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    convert = ["--from", "megarlx", "--to", "hf", run, str(tmp_path / "hf"), "--quiet"]
    assert tool("convert_checkpoint").main([*convert, *average]) == 1
    assert "keeps no average of the weights" in capsys.readouterr().err
    with (
        pytest.raises(CheckpointError, match="keeps no average"),
        megarlx.open(run, weights="average"),
    ):
        pass


def test_the_average_has_no_moments_to_go_on_with(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on = tmp_path / "on.toml"
    on.write_text("[[stages]]\nsteps = 1\n[stages.objectives.pretraining]\ninherit = true\n")
    branch = ["branch", str(runs / "with"), str(on), "--out", str(tmp_path / "x")]
    assert main([*branch, "--weights", "average"]) == 1
    assert "the average of the weights has no moments" in capsys.readouterr().err


def test_a_run_goes_on_with_the_decay_that_it_has_or_not_at_all(
    config: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run, decay in (("with", "0.9"), ("without", "0.9")):
        assert train(config, runs / run, "training.steps=6", f"checkpoints.average_decay={decay}")
        assert "checkpoints.average_decay: was" in capsys.readouterr().err
    for value in ("0", "1", "-0.5"):
        assert train(config, runs / "x", f"checkpoints.average_decay={value}") == 2
        assert "average_decay is" in capsys.readouterr().err


def test_the_recipe_of_the_repository_is_untouched_by_default() -> None:
    assert (
        megarlx.load_config(ROOT / "configs" / "demo_trunk.toml").checkpoints.average_decay is None
    )
