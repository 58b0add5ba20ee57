"""`megarlx train` through stages: pre-training, supervised and policy learning in one run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from training_runs import ROOT, command, run, tensors, train

from megarlx.checkpoint import read_manifest
from megarlx.checkpoint.folder import point_latest_at
from megarlx.training.metrics import read_metrics

CONFIG = """
[model]
family = "olmo2"
vocab_size = 400
hidden_size = 24
layers = 2
heads = 2
intermediate_size = 40
max_sequence_length = 128

[training]
sequences_per_step = 4
sequences_per_microbatch = 4
sequence_length = 64

[optimizer]
lr = 2e-3

[data]
maker = "world"
folder = "{world}"
[data.options]
documents = 300
held_out_documents = 20
prompts = 40

[rl]
prompts_per_step = 2
samples_per_prompt = 2
max_completion_tokens = 8
steps_per_rollout = 2
keep_samples_every_steps = 2
[rl.policy]
preset = "grpo"
[[rl.rewards]]
function = "length_penalty"
options = {{ max_tokens = 8, buffer = 1.0 }}
workers = 0

[sft]
sequence_length = 128

[[stages]]
steps = 3
[stages.objectives.pretraining]

[[stages]]
steps = 5
combine = "average"
[stages.objectives.sft]
[stages.objectives.rl]
lr = 1e-4

[[stages]]
steps = 5
combine = "alternate"
[stages.objectives.pretraining]
inherit = true
turns = 2
[stages.objectives.rl]
lr = 1e-4

[logging]
log_every_steps = 3
validation_sequences = 4
"""
STEPS = 13


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    path = folder / "run.toml"
    path.write_text(CONFIG.format(world=folder / "world"))
    often = ("checkpoints.save_every_steps=1", "checkpoints.keep_last=99")
    assert train(path, folder / "whole", *often) == 0
    return path


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a stopped run says like one that was not."""
    kept = []
    for line in lines:
        found = {k: v for k, v in line.items() if not k.startswith(("perf/", "cost/", "time"))}
        if len(found) > 1:
            kept.append(found)
    return kept


@pytest.mark.parametrize("stop", [2, 3, 4, 7, 8, 11])
def test_a_run_stopped_in_or_between_stages_ends_with_the_same_weights(
    tmp_path: Path, staged: Path, stop: int
) -> None:
    """Stopped by taking away all later checkpoints, as after a crash."""
    whole, parts = staged.parent / "whole", tmp_path / "parts"
    shutil.copytree(whole, parts)
    for step in range(stop + 1, STEPS + 1):
        shutil.rmtree(parts / "checkpoints" / f"iter_{step:08d}", ignore_errors=True)
    newest = parts / "checkpoints" / f"iter_{stop:08d}"
    point_latest_at(newest, read_manifest(newest).digest)
    assert train(staged, parts) == 0
    assert tensors(parts, STEPS) == tensors(whole, STEPS)
    states = [
        read_manifest(folder / "checkpoints" / f"iter_{STEPS:08d}").state
        for folder in (parts, whole)
    ]
    for key in ("positions", "tokens", "work", "stage", "objectives"):
        assert states[0][key] == states[1][key], key


def test_every_objective_is_logged_also_where_they_take_turns(staged: Path) -> None:
    lines = read_metrics(staged.parent / "whole" / "metrics.jsonl")
    by_step = {line["step"]: line for line in lines if "cost/seconds" in line}
    assert set(by_step) == {3, 6, 9, 12, 13}
    kinds = {
        step: {key[5:] for key in line if key.startswith("loss/")} for step, line in by_step.items()
    }
    assert kinds == {
        3: {"pretraining"},
        6: {"sft", "rl"},
        9: {"sft", "rl", "pretraining"},  # steps 6 and 7 average, 8 pre-trains
        12: {"pretraining", "rl"},
        13: {"pretraining"},
    }
    for line in by_step.values():
        for name in (key[5:] for key in line if key.startswith("loss/")):
            assert line[f"grad_norm/{name}"] > 0
            assert line[f"lr/{name}"] > 0


def test_costs_and_tokens_only_grow_and_add_up(staged: Path) -> None:
    lines = read_metrics(staged.parent / "whole" / "metrics.jsonl")
    costs = [line for line in lines if "cost/seconds" in line]
    for key in ("seconds", "trained_tokens", "generated_tokens", "flop"):
        values = [line[f"cost/{key}"] for line in costs]
        assert values == sorted(values), key
    state = read_manifest(staged.parent / "whole" / "checkpoints" / f"iter_{STEPS:08d}").state
    # Pre-training: steps 1 to 3, and two of every three of the last five.
    assert state["tokens"]["pretraining"] == (3 + 4) * 4 * 64
    assert state["positions"] == {"pretraining": 7, "sft": 5, "rl": 1}
    assert state["run"]["tokens"] == state["tokens"]
    assert costs[-1]["cost/trained_tokens"] == sum(state["tokens"].values())
    assert costs[-1]["cost/generated_tokens"] == state["work"]["rl"]["generated_tokens"]


def test_samples_are_kept_for_people_to_read(staged: Path) -> None:
    samples = sorted((staged.parent / "whole" / "samples").glob("step_*.jsonl"))
    assert samples
    lines = [json.loads(line) for line in samples[0].read_text().splitlines()]
    assert {"prompt", "completion", "reference", "reward", "finish_reason", "step"} <= set(lines[0])


@pytest.mark.parametrize("place", ["0.objectives.pretraining", "1.objectives.sft"])
def test_going_on_from_nothing_is_refused(
    tmp_path: Path, staged: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    assert train(staged, tmp_path, f"stages.{place}.inherit=true") == 1
    error = capsys.readouterr().err
    assert f"inherit of {place.rpartition('.')[2]} is true" in error
    assert "no parent to go on from" in error


def test_stages_run_under_torchrun(tmp_path: Path, staged: Path) -> None:
    done = run(
        command(
            staged, tmp_path, "layout.data=2", "training.sequences_per_microbatch=2", processes=2
        )
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = (
        next(line for line in read_metrics(out / "metrics.jsonl") if "loss/pretraining" in line)
        for out in (tmp_path, staged.parent / "whole")
    )
    assert ours["loss/pretraining"] == pytest.approx(theirs["loss/pretraining"], rel=1e-4)


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "configs").glob("demo_*.toml")))
def test_the_configurations_that_come_along_are_valid(name: str) -> None:
    from megarlx.config import load_config

    assert load_config(ROOT / "configs" / name).steps > 0
