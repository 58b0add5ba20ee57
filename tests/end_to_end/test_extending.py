"""docs/extending.md, block by block: what it shows works, and its TOML is a configuration."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from pathlib import Path

import pytest
from documents import fenced
from training_runs import ROOT

from megarlx.cli import main
from megarlx.config.evaluation import EvaluationConfig
from megarlx.config.objectives import RlConfig
from megarlx.config.optimizer import OptimizerConfig
from megarlx.config.run_sections import DataConfig
from megarlx.config.stages import StageConfig
from megarlx.report.claims import judge_all
from megarlx.report.study import Study
from megarlx.training.metrics import read_metrics

DOCUMENT = ROOT / "docs" / "extending.md"
FILE = re.compile(r"# (\w+\.py)\n")


def test_documented_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    # Rewards and environments are imported by processes of their own.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(ROOT))))
    blocks = fenced(DOCUMENT, "python")
    files = []
    shared: dict[str, object] = {"__name__": "documentation"}
    for block in blocks:
        if found := FILE.match(block):
            (tmp_path / found[1]).write_text(block)
            files.append(found[1].removesuffix(".py"))
        else:
            exec(compile(block, f"{DOCUMENT.name}: {block[:60]}", "exec"), shared)
    assert set(files) >= {
        *("my_rewards", "my_rooms", "my_sums", "my_suites", "my_claims", "counting"),
        *("my_losses", "my_advantages", "my_aggregations"),
        *("my_muon", "my_projection", "my_generator", "my_families"),
    }
    assert all(name not in sys.modules for name in ("my_rewards", "my_rooms"))  # not in here


def test_its_configurations_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, loss, third, fourth, _, rule, average = (
        tomllib.loads(block) for block in fenced(DOCUMENT, "toml")
    )
    (reward,) = RlConfig.model_validate(first["rl"]).rewards
    assert (reward.function, reward.weight) == ("my_rewards:brevity", 0.1)
    environment = RlConfig.model_validate(second["rl"]).environment
    assert environment is not None
    assert environment.options == {"rooms": 3}
    policy = RlConfig.model_validate(loss["rl"]).policy
    assert (policy.loss, policy.loss_options) == ("my_losses:two_bounds", {"worst": 3.0})
    (tmp_path / "my_sums.py").write_text(
        next(block for block in fenced(DOCUMENT, "python") if block.startswith("# my_sums.py"))
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    data = DataConfig.model_validate(third["data"])
    assert (data.place, data.options) == ("data/sums-5", {"largest": 5})
    for suites in (third, fourth):
        assert EvaluationConfig.model_validate(suites["evaluation"]).suites[0].made == "sums"
    optimizer = OptimizerConfig.model_validate(rule["optimizer"])
    assert (optimizer.rule, optimizer.rule_options) == ("my_muon:Muon", {"momentum": 0.9})
    (stage,) = average["stages"]
    assert StageConfig.model_validate(stage).combination == "my_projection:projection"


def test_its_claim_judges_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_claims.py").write_text(
        next(block for block in fenced(DOCUMENT, "python") if block.startswith("# my_claims.py"))
    )
    monkeypatch.chdir(tmp_path)
    name = "my_claims.py:finished"
    found = judge_all(Study(tmp_path, []), [name])
    assert found[name].evidence["claim"] == "every run is there, and finished"


def test_its_objective_trains_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = next(b for b in fenced(DOCUMENT, "python") if b.startswith("# counting.py"))
    (tmp_path / "counting.py").write_text(block)
    model = """
    [model]
    vocab_size = 97
    hidden_size = 24
    layers = 2
    heads = 4
    intermediate_size = 40
    [training]
    sequence_length = 16
    device = "cpu"
    """
    recipe = next(b for b in fenced(DOCUMENT, "toml") if "counting.own" in b)
    (tmp_path / "counting.toml").write_text(model + recipe)
    monkeypatch.syspath_prepend(str(tmp_path))
    out = tmp_path / "run"
    assert main(["train", str(tmp_path / "counting.toml"), "--out", str(out)]) == 0
    lines = read_metrics(out / "metrics.jsonl")
    losses = [line["loss/counting"] for line in lines if "loss/counting" in line]
    assert losses[-1] < 4.57  # ln 97: what a guess is worth
    assert main(["plan", str(tmp_path / "counting.toml"), "--gpus", "1"]) == 0
