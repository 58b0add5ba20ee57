"""`megarlx plan` as it is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megarlx.cli import main

ROOT = Path(__file__).resolve().parents[3]
CONFIG = """
[model]
vocab_size = 1000
hidden_size = 96
layers = 4
heads = 6
intermediate_size = 256
max_sequence_length = 512

[training]
steps = 1
sequences_per_step = 16
sequence_length = 128
precision = "bf16"
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "small.toml"
    path.write_text(CONFIG)
    return str(path)


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_tables_name_every_kind_of_memory_and_the_best_layouts(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", config, "--gpus", "4", "--best", "2"]) == 0
    text = capsys.readouterr().out
    for kind in ("weights", "gradients", "optimizer", "activations", "workspace", "peak of a step"):
        assert f" {kind} " in text
    for what in ("none", "selective", "full", "training: MFU", "rollouts (modelled)", "dp=4"):
        assert what in text
    assert "not measured" in text


def test_json_holds_the_plan_and_adds_up(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    values = plan(capsys, config, "--gpus", "8", "--set", "layout.tensor=2", "--objectives", "2")
    configured = values["configured"]
    memory = configured["memory"]
    assert memory.pop("peak") == sum(memory.values())
    seconds = configured["step_seconds"]
    assert seconds.pop("total") == pytest.approx(sum(seconds.values()))
    assert configured["layout"]["layout.data"] == 4
    assert values["bytes_sent"]["dp"]["reduce_scatter"] > values["bytes_sent"]["dp"]["all_gather"]
    assert list(values["optimizer_by_objectives"]) == ["1", "2"]
    assert len(values["best"]) == 5
    totals = [best["step_seconds"]["total"] for best in values["best"]]
    assert totals == sorted(totals)


def test_a_layout_that_was_found_can_be_given_back(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values = plan(capsys, config, "--gpus", "4", "--best", "40")
    best = next(b for b in values["best"] if b["layout"]["layout.pipeline"] == 2)
    given = [f"--set={key}={json.dumps(value)}" for key, value in best["layout"].items()]
    again = plan(capsys, config, "--gpus", "4", *given)
    assert again["configured"] == best


def test_a_cache_counts_in_a_step_where_rollouts_are_asked_for(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    apart = plan(capsys, config, "--gpus", "1")
    beside = plan(capsys, config, "--gpus", "1", "--rollout-slots", "64")
    assert apart["configured"]["memory"]["kv_cache"] == 0
    assert beside["configured"]["memory"]["kv_cache"] == apart["rollouts"]["kv_cache"] > 0


def test_a_dry_run_counts_what_the_formula_says(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = ["--set", "layout.tensor=2", "--set", "layout.pipeline=2"]
    values = plan(capsys, config, "--gpus", "8", *layout, "--dry-run", "--rank", "7")
    assert values["place"] == {"pp": 1, "dp": 1, "tp": 1}
    assert {row["axis"] for row in values["sent"]} == {"tp", "dp", "pp"}
    assert all(row["counted"] == row["formula"] for row in values["sent"])
    assert main(["plan", config, "--gpus", "2", "--dry-run"]) == 0
    assert "bytes of the formula" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "8", "--gpu", "abacus"], "--gpu is 'abacus'; allowed are a100, h100"),
        (["--gpus", "0"], "--gpus is 0; it must be at least 1"),
        (["--gpus", "8", "--objectives", "0"], "--objectives is 0; it must be at least 1"),
        (["--gpus", "8", "--set", "layout.tensor=4"], "6 heads cannot be split over tp=4"),
        (["--gpus", "8", "--set", "layout.tensro=4"], "did you mean 'layout.tensor'"),
        (["--gpus", "4", "--dry-run", "--rank", "4"], "rank is 4; allowed are 0 to 3"),
        (["--gpus", "1", "--prompt-tokens", "600"], "together at most model.max_sequence_length"),
    ],
)
def test_what_cannot_be_planned_is_told_in_one_line(
    config: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["plan", config, *arguments]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert (output.out, output.err.count("\n")) == ("", 1)


def test_only_the_first_process_of_a_launch_speaks(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }.items():
        monkeypatch.setenv(name, value)
    assert main(["plan", config, "--gpus", "2"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["olmo2_1b", "olmo2_4b", "plan_7b"])
def test_a_configured_layout_fits_its_gpus(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    gpus = {"olmo2_1b": "8", "olmo2_4b": "32", "plan_7b": "64"}[name]
    values = plan(capsys, str(ROOT / f"configs/{name}.toml"), "--gpus", gpus, "--best", "1")
    assert values["configured"]["fits"]
    # And it is not far from the best that there is.
    found = values["best"][0]["step_seconds"]["total"]
    assert values["configured"]["step_seconds"]["total"] < 1.1 * found
