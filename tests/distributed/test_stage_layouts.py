"""Averaging and alternating in any layout give the single process's weights, in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from grid import RandomSequences, assemble, chunks, model

from megarlx.comm.groups import Mesh
from megarlx.data.loader import BatchLayout, Loader
from megarlx.data.samples import Sample
from megarlx.model.build import build_model
from megarlx.objectives.supervised import Supervised
from megarlx.training.parts import UpdateSettings
from megarlx.training.shares import Adaptation, Course, Shares
from megarlx.training.trainer import TrainedObjective, Trainer, TrainingStage

SEQUENCES = 8
LAYOUTS = [{"tp": 2}, {"pp": 2}, {"dp": 2}, {"tp": 2, "dp": 2}]
KINDS = ["average", "adaptive", "gradients", "alternate", "stages"]
ADAM = UpdateSettings(weight_decay=0.1, clip_norm=0.5)
OTHER = UpdateSettings((0.8, 0.9), weight_decay=0.02, decay_embeddings=False, clip_norm=0.2)


class Later(RandomSequences):
    """Other numbers than those of the first objective."""

    def sample(self, index: int) -> Sample:
        return super().sample(index + 10_000)


def stages_of(kind: str, mesh: Mesh) -> list[TrainingStage]:
    layout = BatchLayout(SEQUENCES, SEQUENCES // mesh.dp.size // 2, mesh.dp.rank, mesh.dp.size)
    one, two = (
        Supervised(name, Loader(data, layout, prefetch_steps=0))
        for name, data in (("sft", RandomSequences()), ("rl", Later()))
    )
    second = ADAM if kind == "gradients" else OTHER
    first_of_all = TrainedObjective(one, ADAM, lambda step: 1e-3, turns=2)
    members = [first_of_all, TrainedObjective(two, second, lambda step: 1e-3 * (1 + step))]
    courses = {"sft": Course(1.0, 1.0), "rl": Course(2.0, 0.5)}
    if kind == "alternate":
        return [TrainingStage(members, combine="alternate")]
    if kind == "gradients":
        members[1] = TrainedObjective(two, ADAM, lambda step: 1e-3)
        return [TrainingStage(members, shared_moments=True, shares=Shares(courses, 5))]
    if kind == "stages":
        on = TrainedObjective(one, ADAM, lambda step: 1e-3, inherit=True)
        return [
            TrainingStage(members[:1], steps=2, combine="single"),
            TrainingStage(members[1:], steps=1, combine="single"),
            TrainingStage([on, members[1]], steps=2),
        ]
    adaptation = Adaptation(0.5, 3.0, 0.1) if kind == "adaptive" else None
    return [TrainingStage(members, shares=Shares(courses, 5, adaptation))]


def train(kind: str, axes: dict[str, int]) -> dict[str, Any]:
    mesh = Mesh.build(**axes, timeout_seconds=30) if axes else Mesh.alone()
    built = build_model(
        model("llama3", tied=False), mesh, seed=7, dtype=torch.float64, bucket_elements=5000
    )
    trainer = Trainer(built, stages_of(kind, mesh))
    losses, shares, norms = [], [], []
    for _ in range(5):
        found, report = trainer.step()
        losses += trainer.global_loss(found).values()
        norms += [float(norm) for norm in report.gradient_norms.values()]
        shares += (trainer.last_shares or {}).values()
    return {
        "losses": losses,
        "norms": norms,
        "shares": shares,
        "tokens": {name: float(count) for name, count in trainer.tokens.items()},
        "weights": chunks(trainer, trainer.optimizer.master),
    }


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_gives_the_weights_of_the_single_process(
    run: Callable[..., Any], kind: str, axes: dict[str, int]
) -> None:
    (single,) = run(1, train, kind, {})
    ranks = run(int(np.prod(list(axes.values()))), train, kind, axes)
    config = model("llama3", tied=False)
    expected = assemble(config, [single["weights"]])
    found = assemble(config, [rank["weights"] for rank in ranks])
    for name, weight in expected.items():
        error = np.linalg.norm(found[name] - weight) / np.linalg.norm(weight)
        assert error < 1e-9, f"{name}: {error}"
    for rank in ranks:
        np.testing.assert_allclose(rank["losses"], single["losses"], rtol=1e-10)
        np.testing.assert_allclose(rank["norms"], single["norms"], rtol=1e-9)
        np.testing.assert_allclose(rank["shares"], single["shares"], rtol=1e-10)
        assert rank["tokens"] == single["tokens"]
