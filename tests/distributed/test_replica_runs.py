"""`megarlx train` with replicas: what is logged, when it saves, and where it goes on from there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megarlx.comm.launch import Launch
from megarlx.config import Config
from megarlx.run.assemble import assemble, check_placement, choose_layout
from megarlx.run.directory import RunError
from megarlx.run.loop import check_startable, train
from megarlx.training.metrics import read_metrics

TOKENS = {"sequences_per_step": 4, "sequences_per_microbatch": 1, "sequence_length": 160}
SMALL = {
    "family": "olmo2",
    "vocab_size": 400,
    "hidden_size": 24,
    "layers": 2,
    "heads": 2,
    "intermediate_size": 40,
    "max_sequence_length": 192,
}
RL = {
    "prompts_per_step": 2,
    "samples_per_prompt": 2,
    "max_completion_tokens": 6,
    "rewards": [{"function": "marked_answer", "workers": 0}],
}


def config(world: str = "nowhere", replica: int = 2, **stage: Any) -> Config:
    average = {
        "steps": 4,
        "combine": "average",
        "placement": "replicas",
        "objectives": {"sft": {"lr": 1e-3}, "rl": {"lr": 1e-3}},
    }
    return Config.model_validate(
        {
            "model": SMALL,
            "training": {**TOKENS, "precision": "fp64"},
            "data": {
                "maker": "world",
                "folder": world,
                "options": {"documents": 60, "held_out_documents": 6},
            },
            "sft": {},
            "rl": RL,
            "stages": [{"steps": 1, "objectives": {"pretraining": {}}}, average | stage],
            "checkpoints": {"save_every_steps": 3},
            "logging": {"log_every_steps": 1, "validation_sequences": 4},
            "layout": {"replica": replica},
        }
    )


def run_it(folder: Path, replica: int, stage: dict[str, Any]) -> str:
    rank = dist.get_rank() if dist.is_initialized() else 0
    started = Launch(rank, rank, replica, replica)
    given = config(str(folder / "world"), replica, **stage)
    made = assemble(given, folder / "run", started, torch.device("cpu"))
    check_startable(made, False)
    if rank == 0:
        made.write_description(folder / "none.json")
    return train(made)


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "run" / "checkpoints").glob("iter_*"))


@pytest.mark.parametrize("options", [{}, {"generate_together": False}], ids=str)
def test_rank_0_tells_of_every_replica_and_a_run_goes_on_colocated(
    run: Callable[..., Any], tmp_path: Path, options: dict[str, Any]
) -> None:
    assert run(2, run_it, tmp_path, 2, options) == ["", ""]
    lines = {
        x["step"]: x for x in read_metrics(tmp_path / "run" / "metrics.jsonl") if "cost/flop" in x
    }
    assert "perf/idle_share" not in lines[1]
    for step in range(2, 6):
        line = lines[step]
        for name in ("sft", "rl"):
            assert {f"loss/{name}", f"grad_norm/{name}", f"lr/{name}", f"share/{name}"} <= set(line)
        assert line["rl/generated_tokens"] > 0
        assert 0 <= line["perf/idle_share"] <= 1
    generated = sum(lines[step]["rl/generated_tokens"] for step in range(2, 6))
    assert lines[5]["cost/generated_tokens"] == generated
    assert saved(tmp_path) == [3, 5]
    samples = tmp_path / "run" / "samples" / "step_00000000.rl.jsonl"
    assert len(samples.read_text().splitlines()) >= 2

    if not options:
        assert run(1, run_it, tmp_path / "alone", 1, {"placement": "colocated"}) == [""]
        probe = Path("run/evaluations/iter_00000001.rl-readiness.json")
        own, alone = (
            json.loads((folder / probe).read_text()) for folder in (tmp_path, tmp_path / "alone")
        )
        assert (own["items"], own["metrics"]) == (alone["items"], alone["metrics"])
        assert len(own["items"]) == 32

    # One process goes on from the middle with both objectives, and comes to the same.
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "iter_00000005")
    (checkpoints / "latest").unlink()
    assert run(1, run_it, tmp_path, 1, {**options, "placement": "colocated"}) == [""]
    again = [x for x in read_metrics(tmp_path / "run" / "metrics.jsonl") if "cost/flop" in x]
    assert again[-1]["step"] == 5
    for name in ("loss/sft", "loss/rl", "grad_norm/sft", "cost/generated_tokens"):
        assert again[-1][name] == pytest.approx(lines[5][name], rel=1e-8, abs=1e-12)


def test_a_checkpoint_between_two_averages_waits_for_the_next(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    assert run(2, run_it, tmp_path, 2, {"sync_every": 3}) == ["", ""]
    assert saved(tmp_path) == [4, 5]
    resolved = json.loads((tmp_path / "run" / "resolved.json").read_text())
    assert resolved["stages"][1]["sync_every"] == 3


@pytest.mark.parametrize("replica", [1, 3])
def test_another_number_of_replicas_than_of_objectives_is_refused(replica: int) -> None:
    with pytest.raises(
        RunError, match=rf"layout.replica is {replica}; stage 'sft\+rl' .* is 2, one"
    ):
        check_placement(config(replica=replica))
    check_placement(config())


def test_replicas_without_a_stage_for_them_are_refused() -> None:
    colocated = config(placement="colocated")
    with pytest.raises(RunError, match=r"layout.replica is 2; .* no stage has placement"):
        choose_layout(colocated, 2)
    assert choose_layout(config(), 4).sizes == (1, 2, 2, 1)
