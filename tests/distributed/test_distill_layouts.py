"""Distillation over vocabulary shards and in every layout, against one process, in fp64."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grid import chunks

sys.path += [str(Path(__file__).resolve().parents[1] / "unit" / x) for x in ("objectives", "ops")]
from distill_cases import case
from distill_objectives import config, distillation
from rl_cases import model
from test_rl_layouts import mesh_of, size, whole

from megarlx.checkpoint import Saver, latest
from megarlx.comm.groups import Mesh
from megarlx.ops import Teacher, linear_distill_loss
from megarlx.training.parts import UpdateSettings
from megarlx.training.trainer import TrainedObjective, Trainer, TrainingStage

LAYOUTS = [{"tp": 2}, {"tp": 2, "sp": 1}, {"pp": 2}, {"dp": 2}]
OPTIONS: dict[str, Any] = {
    "rows": 24,
    "vocabulary": 11,
    "shares": (0.25, 0.75),
    "masked": True,
    "temperature": 0.7,
    "final_cap": 3.0,
    "rows_per_chunk": 4,
}


def sharded(ranks: int, kl: str) -> dict[str, Any]:
    """The second rank of two has padding ids only."""
    made, tp = case(**OPTIONS), Mesh.build(tp=ranks).tp if ranks > 1 else Mesh.alone().tp
    made.weight = made.weight.detach().chunk(ranks)[tp.rank].clone().requires_grad_()
    teachers = [Teacher(x.hidden, x.weight.chunk(ranks)[tp.rank], x.share) for x in made.teachers]
    result = linear_distill_loss(made.head(tp), teachers, kl=kl, **made.rest)
    result.loss.backward()
    assert made.hidden.grad is not None
    assert made.weight.grad is not None
    return {
        "whole": [result.loss.detach(), result.logprobs, result.metrics],
        "hidden": made.hidden.grad,
        "weight": made.weight.grad,
    }


@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_shards_of_the_vocabulary_give_the_whole(run: Callable[..., Any], kl: str) -> None:
    (alone,), ranks = run(1, sharded, 1, kl), run(2, sharded, 2, kl)
    for rank in ranks:
        for found, expected in zip(rank["whole"], alone["whole"], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    hidden = sum(rank["hidden"] for rank in ranks)  # head.hidden's backward sums it
    torch.testing.assert_close(hidden, alone["hidden"], rtol=1e-12, atol=1e-13)
    weight = torch.cat([rank["weight"] for rank in ranks])
    torch.testing.assert_close(weight, alone["weight"], rtol=1e-12, atol=1e-13)


def trainer_of(axes: dict[str, int], seed: int = 3, **options: Any) -> Trainer:
    split = "sp" in axes  # along the sequence too
    mesh = mesh_of({key: size for key, size in axes.items() if key != "sp"})
    student = model(seed, torch.float64, mesh, sequence_parallel=split)
    one = distillation(config(rollout_every_steps=2, **options), student)
    member = TrainedObjective(one, UpdateSettings(), lambda step: 1e-3)
    return Trainer(student, [TrainingStage([member], combine="single")])


def train(axes: dict[str, int], folder: Path) -> dict[str, Any]:
    """Three steps, the last of a second rollout; and again the last two, from a checkpoint."""
    first = trainer_of(axes)
    losses = [first.global_loss(first.step()[0])["distill"]]
    first.save(Saver(folder, first.mesh.world), {}, blocking=True)
    losses += [first.global_loss(first.step()[0])["distill"] for _ in range(2)]
    again = trainer_of(axes, seed=8)
    found = latest(folder, again.mesh.world)
    assert found is not None
    again.resume(found)
    assert [again.global_loss(again.step()[0])["distill"] for _ in range(2)] == losses[1:]
    assert torch.equal(first.optimizer.master, again.optimizer.master)
    one = first.objectives["distill"]
    return {
        "losses": losses,
        "metrics": one.metrics(),
        "work": vars(one.work),
        "weights": chunks(first, first.optimizer.master),
    }


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_distilling_trains_the_same_weights_and_resumes_exactly_in_every_layout(
    run: Callable[..., Any], tmp_path: Path, axes: dict[str, int]
) -> None:
    (single,) = run(1, train, {}, tmp_path / "alone")
    ranks = run(size(axes), train, axes, tmp_path / "ranks")
    for rank in ranks:
        np.testing.assert_allclose(rank["losses"], single["losses"], rtol=1e-9)
        assert rank["metrics"] == pytest.approx(single["metrics"], rel=1e-9)
        assert rank["work"] == single["work"]
    ours, theirs = (whole([one["weights"] for one in parts]) for parts in (ranks, [single]))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        error = np.linalg.norm(np.sort(ours[name]) - np.sort(weight)) / np.linalg.norm(weight)
        assert error < 1e-9, f"{name}: {error}"


def averaged(axes: dict[str, int], together: bool) -> dict[str, Any]:
    """Two that distil, each in its replica where there are two: own samples, and kept texts."""
    student = model(3, torch.float64, mesh_of(axes))
    kept = config(rollout_every_steps=2, kl="forward", rollouts="run", teachers=["t13@1"])
    made = [
        distillation(config(rollout_every_steps=2), student),
        distillation(kept, student, seeds=(13,), name="kept"),
    ]
    stage = TrainingStage(
        [TrainedObjective(one, UpdateSettings(), lambda step: 1e-3) for one in made],
        placement="replicas" if axes else "colocated",
        generate_together=together,
    )
    trainer = Trainer(student, [stage])
    for _ in range(3):
        trainer.step()
    return {
        "weights": chunks(trainer, trainer.optimizer.master),
        "states": trainer.replicas.states(),
    }


@pytest.mark.parametrize("together", [False, True])
def test_distilling_in_a_replica_of_its_own_is_distilling_beside_the_other(
    run: Callable[..., Any], together: bool
) -> None:
    (single,) = run(1, averaged, {}, together)
    for rank in run(2, averaged, {"replica": 2}, together):
        assert rank["states"] == single["states"]
        ours, theirs = (whole([one["weights"]]) for one in (rank, single))
        for name, weight in theirs.items():
            np.testing.assert_allclose(ours[name], weight, rtol=1e-9, atol=1e-12, err_msg=name)
