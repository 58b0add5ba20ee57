"""Several revisions of a public model become one run, found by iteration and by tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hf_cases import convert, published, save

from megarlx.checkpoint import iterations, latest, read_manifest
from megarlx.config import Config, load_config
from megarlx.hf.errors import ConversionError
from megarlx.hf.trunk import find_checkpoint, model_of_run, parse_tokens


def revision(folder: Path, shift: float, **changes: object) -> Path:
    model = published("olmo2", **changes)
    with torch.no_grad():
        model.model.norm.weight += shift
    return save(model, folder)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Added out of order, as downloads come."""
    for iteration, tokens in ((2000, "4B"), (1000, "2B"), (3000, "6.5B")):
        source = revision(tmp_path / f"step{iteration}", float(iteration))
        convert(source, tmp_path / "run", iteration=iteration, tokens=tokens)
    return tmp_path / "run"


def test_revisions_become_one_run_in_the_order_of_their_iterations(run: Path) -> None:
    assert iterations(run / "checkpoints") == [1000, 2000, 3000]
    newest = latest(run / "checkpoints")
    assert newest is not None
    assert newest.name == "iter_00003000"
    config = load_config(run / "resolved.json")
    assert isinstance(config, Config)
    assert config == load_config(run / "config.toml")
    assert config.model == model_of_run(run)
    lineage = json.loads((run / "lineage.json").read_text())
    assert lineage["parent"] is None
    assert lineage["trunk_tokens"] == 0
    assert [int(i) for i in lineage["converted"]] == [1000, 2000, 3000]
    assert lineage["converted"]["3000"]["tokens"] == 6_500_000_000
    state = read_manifest(newest).state
    assert state["steps_done"] == 3000
    assert state["run"]["tokens"] == {"pretraining": 6_500_000_000, "sft": 0, "rl": 0}


@pytest.mark.parametrize(
    ("name", "iteration"),
    [
        ("", 3000),
        ("@latest", 3000),
        ("@1000", 1000),
        ("@tokens:1", 1000),
        ("@tokens:2B", 1000),
        ("@tokens:2001M", 2000),
        ("@tokens:6500000000", 3000),
    ],
)
def test_a_checkpoint_is_found_by_iteration_and_by_tokens(
    run: Path, name: str, iteration: int
) -> None:
    assert find_checkpoint(f"{run}{name}").name == f"iter_{iteration:08d}"


@pytest.mark.parametrize("name", ["@1001", "@tokens:7B", "@last", "@-1"])
def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(
    run: Path, name: str
) -> None:
    with pytest.raises(ConversionError, match="has 1000, 2000, 3000"):
        find_checkpoint(f"{run}{name}")


def test_tokens_are_counts_or_counts_with_a_letter() -> None:
    assert parse_tokens("4B") == 4_000_000_000
    assert parse_tokens("4194304000001") == 4_194_304_000_001
    assert parse_tokens("2.5M") == 2_500_000
    with pytest.raises(ConversionError, match="tokens is '4 billion'"):
        parse_tokens("4 billion")


def test_the_same_command_again_changes_nothing(run: Path, tmp_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    assert convert(tmp_path / "step1000", run, iteration=1000, tokens="2B") == 0
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before


def test_another_revision_in_place_of_one_needs_to_be_asked_for(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="iter_00001000 is there already, from another"):
        convert(tmp_path / "step2000", run, iteration=1000, tokens="2B")
    convert(tmp_path / "step2000", run, iteration=1000, tokens="2B", fresh=True)
    digests = [
        [f.sha256 for f in read_manifest(find_checkpoint(f"{run}@{i}")).files] for i in (1000, 2000)
    ]
    assert digests[0] == digests[1]


def test_tokens_must_rise_with_iterations(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="iteration 2500 cannot have seen 3000000000"):
        convert(tmp_path / "step1000", run, iteration=2500, tokens="3B")
    with pytest.raises(ConversionError, match="iteration 10 cannot have seen 3000000000"):
        convert(tmp_path / "step1000", run, iteration=10, tokens="3B")
    assert iterations(run / "checkpoints") == [1000, 2000, 3000]


def test_another_model_or_tokenizer_is_refused_with_the_difference(
    run: Path, tmp_path: Path
) -> None:
    other = revision(tmp_path / "other", 0.0, num_hidden_layers=2)
    with pytest.raises(ConversionError, match="holds another model: layers was 3, is 2"):
        convert(other, run, iteration=4000, tokens="8B")


def test_a_run_that_was_trained_here_takes_no_converted_checkpoint(
    run: Path, tmp_path: Path
) -> None:
    lineage = json.loads((run / "lineage.json").read_text())
    del lineage["converted"]
    (run / "lineage.json").write_text(json.dumps(lineage))
    with pytest.raises(ConversionError, match="was trained by megarlx"):
        convert(tmp_path / "step1000", run, iteration=4000, tokens="8B")
