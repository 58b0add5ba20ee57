"""What a run counts, and what it does not let pass: bad gradients, replicas that differ."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import environment, losses, tensors, train

from megarlx.training.metrics import read_metrics
from megarlx.training.trainer import Trainer


def test_tokens_per_source_and_the_pause_of_saves_are_logged(tmp_path: Path, config: Path) -> None:
    assert train(config, tmp_path, "checkpoints.save_every_steps=4") == 0
    lines = list(read_metrics(tmp_path / "metrics.jsonl"))
    sources = [f"data/{kind}_tokens" for kind in ("problems", "facts", "stories")]
    counted = {x["step"]: [x[key] for key in sources] for x in lines if sources[0] in x}
    assert sorted(counted) == list(range(1, 13))
    assert all(sum(tokens) == step * 8 * 32 for step, tokens in counted.items())
    assert all(tokens > 0 for tokens in counted[12])
    key = "perf/save_pause_seconds"
    pauses = {x["step"]: x[key] for x in lines if key in x}
    assert sorted(pauses) == [4, 8, 12]
    assert all(0 < seconds < 10 for seconds in pauses.values())


def test_a_gradient_that_is_not_finite_costs_its_step_and_is_counted(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward_backward = Trainer.forward_backward

    def spoilt(trainer: Trainer, objective: object) -> torch.Tensor:
        loss = forward_backward(trainer, objective)  # type: ignore[arg-type]
        if trainer.steps_done == 4:
            trainer.optimizer.gradient_shard("pretraining")[7] = float("inf")
        return loss

    monkeypatch.setattr(Trainer, "forward_backward", spoilt)
    overrides = ("checkpoints.save_every_steps=1", "checkpoints.in_background=false")
    assert train(config, tmp_path, *overrides, "training.steps=6") == 0
    assert tensors(tmp_path, 5) == tensors(tmp_path, 4)  # weights and moments stay as they were
    assert tensors(tmp_path, 6) != tensors(tmp_path, 5)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    skipped = [x["perf/skipped_updates"] for x in lines if "perf/skipped_updates" in x]
    assert skipped == [0, 0, 0, 0, 1, 1]
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]


DIVERGING = """
import os, sys, torch
from megarlx.cli import main
from megarlx.training.trainer import Trainer
step = Trainer.step
def wrong(trainer, *arguments, **others):
    result = step(trainer, *arguments, **others)
    if os.environ["RANK"] == "1" and trainer.steps_done == 3:
        with torch.no_grad():
            weights = trainer.model.data_parallel.weights
            weights[5] += 1e-3 * weights[5].abs() + 1e-6
    return result
Trainer.step = wrong
sys.exit(main(sys.argv[1:]))
"""


def test_replicas_whose_weights_differ_stop_the_run_and_the_rank_is_named(
    tmp_path: Path, config: Path
) -> None:
    (tmp_path / "diverging.py").write_text(DIVERGING)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [
            *(*launcher, "--nproc-per-node", "2", str(tmp_path / "diverging.py")),
            *("train", str(config), "--out", str(tmp_path / "run"), "--set", "layout.data=2"),
            *("--set", "logging.compare_replicas_every_steps=1"),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "step 3: the weights of rank 1 differ from those of rank 0" in done.stderr
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3]
    for rank in (0, 1):
        log = (tmp_path / "run" / "logs" / f"rank_{rank:05d}.log").read_text()
        assert f"--- rank {rank} on " in log
        assert ("step 2/12: loss" in log) == (rank == 0)
        assert "TrainingError: step 3: the weights of rank 1 differ" in log
