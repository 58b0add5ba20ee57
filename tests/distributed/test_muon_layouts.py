"""Muon sees whole matrices in every layout: fp64 weights are those of one process."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grid import RandomSequences, assemble, chunks

from megarlx.checkpoint import Saver, latest
from megarlx.comm.collectives import all_gather
from megarlx.comm.groups import Mesh
from megarlx.config.model import ModelConfig, family_config
from megarlx.data.loader import BatchLayout, Loader
from megarlx.model.build import build_model
from megarlx.objectives.supervised import Supervised
from megarlx.training.parts import UpdateSettings
from megarlx.training.trainer import TrainedObjective, Trainer, TrainingStage
from megarlx.training.whole_tensors import WholeTensors

Axes = dict[str, int]
SEQUENCES, STEPS = 12, 5
SETTINGS = UpdateSettings(weight_decay=0.1, clip_norm=0.5, rule="muon")
# Key heads are fewer than tensor-parallel ranks; a bucket ends inside of a layer.
LAYOUTS: list[Axes] = [{"tp": 2, "dp": 3}, {"tp": 4}, {"tp": 2, "pp": 2}]


def model(tied: bool = False) -> ModelConfig:
    return family_config(
        "olmo2",
        vocab_size=203,
        hidden_size=24,
        layers=4,
        heads=4,
        kv_heads=1,
        head_dim=6,
        intermediate_size=40,
        tied_embeddings=tied,
    )


def trainer_of(axes: Axes, *, seed: int = 7, tied: bool = False) -> Trainer:
    mesh = Mesh.build(**axes, timeout_seconds=60) if axes else Mesh.alone()
    built = build_model(
        model(tied),
        mesh,
        seed=seed,
        sequence_parallel=axes.get("tp", 1) == 4,
        dtype=torch.float64,
        bucket_elements=3000,
    )
    each = 2 if mesh.dp.size == 3 else SEQUENCES // 2
    dealt = BatchLayout(SEQUENCES, each, mesh.dp.rank, mesh.dp.size)
    objective = Supervised("pretraining", Loader(RandomSequences(), dealt, prefetch_steps=0))
    member = TrainedObjective(objective, SETTINGS, lambda step: 1e-2)
    return Trainer(built, [TrainingStage([member], combine="single")])


def train(axes: Axes, tied: bool) -> dict[str, Any]:
    trainer = trainer_of(axes, tied=tied)
    losses = [trainer.global_loss(trainer.step()[0])["pretraining"] for _ in range(STEPS)]
    kept = trainer.optimizer.kept.shards["pretraining"]
    return {
        "losses": losses,
        "weights": chunks(trainer, trainer.optimizer.master),
        "momentum": chunks(trainer, kept["exp_avg"]),
        "made": len(trainer.optimizer._parts["pretraining"].wholes.mine),  # type: ignore[union-attr]
        "copies": copies_differ(trainer),
    }


def copies_differ(trainer: Trainer) -> float:
    """Between this rank's key/value heads and those of others that hold the same."""
    held = trainer.model.data_parallel.parameters
    copies = [
        piece.of_parameter(held[name].detach()).reshape(-1)
        for name, one in trainer.model.layouts.items()
        for piece in one.pieces
        if len(piece.replicated_over) == trainer.mesh.tp.size > 1
    ]
    if not copies:
        return 0.0
    flat = torch.cat(copies)
    return float((all_gather(flat[None], trainer.mesh.tp) - flat).abs().max())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_muon_in_any_layout(run: Callable[..., Any], axes: Axes, tied: bool) -> None:
    (single,) = run(1, train, {}, tied)
    ranks = run(math.prod(axes.values()), train, axes, tied, time_limit=240)
    for what in ("weights", "momentum"):
        expected = assemble(model(tied), [single[what]])
        found = assemble(model(tied), [rank[what] for rank in ranks])
        for name, tensor in expected.items():
            error = np.linalg.norm(found[name] - tensor) / np.linalg.norm(tensor)
            assert error < 1e-9, f"{what} of {name}: {error}"
    for rank in ranks:
        np.testing.assert_allclose(rank["losses"], single["losses"], rtol=1e-9)
        assert rank["copies"] == 0
    # Every matrix of a layer was made once, and every rank had some.
    made = [rank["made"] for rank in ranks]
    assert sum(made) == single["made"] == 4 * 7
    assert min(made) > 0


def resumes(axes: Axes, folder: Path) -> bool:
    first = trainer_of(axes)
    for _ in range(2):
        first.step()
    first.save(Saver(folder, first.mesh.world), {}, blocking=True)
    again = trainer_of(axes, seed=9)
    found = latest(folder, again.mesh.world)
    assert found is not None
    again.resume(found)
    for _ in range(2):
        first.step(), again.step()
    one, other = first.optimizer, again.optimizer
    pairs = zip(one.shards.shards.values(), other.shards.shards.values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs) and torch.equal(one.steps, other.steps)


def test_muon_resumes_exactly(run: Callable[..., Any], tmp_path: Path) -> None:
    assert all(run(6, resumes, {"tp": 2, "dp": 3}, tmp_path, time_limit=240))


def goes_on_elsewhere(axes: Axes, folder: Path) -> Any:
    trainer = trainer_of(axes, seed=9)
    trainer.resume(folder / "iter_00000002")
    trainer.step()
    return chunks(trainer, trainer.optimizer.master)


def test_a_state_of_muon_goes_on_in_another_layout(run: Callable[..., Any], tmp_path: Path) -> None:
    assert all(run(2, resumes, {"tp": 2}, tmp_path))
    (one,) = run(1, goes_on_elsewhere, {}, tmp_path)
    ranks = run(2, goes_on_elsewhere, {"dp": 2}, tmp_path)
    expected, found = assemble(model(), [one]), assemble(model(), ranks)
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-9, atol=1e-12, err_msg=name)


def doubled(axes: Axes) -> list[bool]:
    """Whole tensors are whole: what a function sees, and where its result goes."""
    trainer = trainer_of(axes)
    parallel = trainer.model.data_parallel
    seen: list[tuple[int, ...]] = []

    def twice(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(tensor.shape))
        return 2 * tensor

    every = WholeTensors.of(trainer.model, lambda name, shape: True)
    shard = trainer.optimizer.master
    changed = every.changed(shard, twice)
    pieces = list(parallel.layout.chunks(parallel.layouts, parallel.group.rank))
    covered = torch.zeros_like(shard, dtype=torch.bool)
    for _, start, block in pieces:
        covered[start : start + math.prod(block.size)] = True
    with pytest.raises(ValueError, match=r"of a whole tensor is .*; it must be"):
        every.changed(shard, lambda tensor: tensor.flatten()[:1])
    return [
        torch.equal(changed, torch.where(covered, 2 * shard, 0)),
        set(seen) <= {tuple(shape) for shape in model().tensor_shapes().values()},
    ]


@pytest.mark.parametrize("axes", [{"tp": 2, "dp": 2}, {"dp": 3}, {"tp": 4}], ids=str)
def test_every_tensor_is_seen_whole_and_dealt_out_to_all_that_hold_it(
    run: Callable[..., Any], axes: Axes
) -> None:
    for found in run(math.prod(axes.values()), doubled, axes):
        assert all(found)
