"""A combination that is no sum gives the same weights wherever objectives are placed, in fp64."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grid import assemble, chunks, model
from test_replicas import COURSES, Shifted, mesh_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
from stage_cases import ADAMS, RATES, Scaled

from megarlx.checkpoint import Saver, latest
from megarlx.comm.collectives import all_gather
from megarlx.comm.groups import Mesh
from megarlx.data.loader import BatchLayout, Loader
from megarlx.model.build import build_model
from megarlx.training.combine import projection, sign_agreement
from megarlx.training.shares import Adaptation, Shares
from megarlx.training.stages import TrainedObjective, TrainingStage
from megarlx.training.trainer import Trainer

Axes = dict[str, int]
STEPS = 6
KINDS: dict[str, dict[str, Any]] = {
    "every step": {},
    "local steps": {"sync_every": 3},
    "adaptive": {"adaptive": True, "sync_every": 3},
    "signs": {"combination": sign_agreement},
    "gradients": {"one_state": True},
    "muon": {"rule": "muon"},
}
PLACED: list[Axes] = [{"replica": 2}, {"replica": 2, "dp": 2}, {"replica": 2, "tp": 2}]


def scales(names: str) -> dict[str, Callable[[int], float]]:
    """a and b disagree at every second step; the third one of b is not finite."""
    return {
        "a": lambda step: -1.0 if step % 2 else 1.0,
        "b": lambda step: math.inf if step == 2 else 1.0,
        "c": lambda step: 1.0,
    }


def stage_of(kind: str, mesh: Mesh, names: str) -> TrainingStage:
    given = {"sync_every": 1, "combination": projection, "one_state": False, **KINDS[kind]}
    dealt = BatchLayout(8, 1, mesh.dp.rank, mesh.dp.size)
    members = []
    for name in names:
        made = Scaled(name, Loader(Shifted(name), dealt, prefetch_steps=0))
        made.scale = scales(names)[name]
        adam, rate = (ADAMS["a"], RATES["a"]) if given["one_state"] else (ADAMS[name], RATES[name])
        if name == "a" and "rule" in given:
            adam = replace(adam, rule=given["rule"])
        members.append(TrainedObjective(made, adam, rate))
    adaptation = Adaptation(0.5, 3.0, 0.1) if "adaptive" in given else None
    return TrainingStage(
        members,
        steps=STEPS,
        shared_moments=given["one_state"],
        combination=given["combination"],
        shares=Shares({name: COURSES[name] for name in names}, STEPS, adaptation),
        placement="replicas" if mesh.replica.size > 1 else "colocated",
        sync_every=given["sync_every"],
    )


def trainer_of(kind: str, axes: Axes, names: str = "ab", seed: int = 7) -> Trainer:
    mesh = mesh_of(axes)
    built = build_model(
        model("llama3", tied=False), mesh, seed=seed, dtype=torch.float64, bucket_elements=5000
    )
    return Trainer(built, [stage_of(kind, mesh, names)])


def go_on(trainer: Trainer, steps: int) -> dict[str, Any]:
    losses, shares = [], []
    for _ in range(steps):
        losses += trainer.global_loss(trainer.step()[0]).values()
        shares += (trainer.last_shares or {}).values()
    master = trainer.optimizer.master
    every = all_gather(master[None], trainer.mesh.replica)
    return {
        "losses": losses,
        "shares": shares,
        "weights": chunks(trainer, master),
        "replica": trainer.mesh.replica.rank,
        "equal": bool((every == master).all()),
        "steps": dict(zip(trainer.optimizer.owners, trainer.optimizer.steps.tolist(), strict=True)),
    }


def train(kind: str, axes: Axes, names: str = "ab") -> dict[str, Any]:
    return go_on(trainer_of(kind, axes, names), STEPS)


@pytest.mark.parametrize("axes", PLACED, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_projection_in_both_placements(run: Callable[..., Any], kind: str, axes: Axes) -> None:
    (single,) = run(1, train, kind, {})
    ranks = run(math.prod(axes.values()), train, kind, axes, time_limit=120)
    config = model("llama3", tied=False)
    expected = assemble(config, [single["weights"]])
    for replica in range(2):
        here = [rank for rank in ranks if rank["replica"] == replica]
        found = assemble(config, [rank["weights"] for rank in here])
        for name, weight in expected.items():
            error = np.linalg.norm(found[name] - weight) / np.linalg.norm(weight)
            assert error < 1e-9, f"{name}: {error}"
    for rank in ranks:
        assert rank["equal"]
        np.testing.assert_allclose(rank["losses"], single["losses"], rtol=1e-9)
        np.testing.assert_allclose(rank["shares"], single["shares"], rtol=1e-9)
        assert rank["steps"].items() <= single["steps"].items()


def test_three_replicas_are_projected_in_the_stages_order(run: Callable[..., Any]) -> None:
    (single,) = run(1, train, "every step", {}, "abc")
    ranks = run(3, train, "every step", {"replica": 3}, "abc")
    config = model("llama3", tied=False)
    expected = assemble(config, [single["weights"]])
    found = assemble(config, [ranks[2]["weights"]])
    for name, weight in expected.items():
        assert np.linalg.norm(found[name] - weight) < 1e-9 * np.linalg.norm(weight), name
    assert all(rank["equal"] for rank in ranks)


def one_left(axes: Axes) -> tuple[float, float]:
    """How far the step that b skips is from share · delta of a, and from delta itself."""
    trainer = trainer_of("every step", axes)
    go_on(trainer, 2)
    optimizer = trainer.optimizer
    before, made = optimizer.master.clone(), []
    rule = optimizer.kept.rules["a"]
    delta = rule.delta

    def kept(*given: Any, **named: Any) -> torch.Tensor:
        made.append(delta(*given, **named))
        return made[-1]

    rule.delta = kept  # type: ignore[method-assign]
    go_on(trainer, 1)
    moved = optimizer.master - before
    if not made:  # a is of the other replica
        return 0.0, 1.0
    share = (trainer.last_shares or {})["a"]
    return float((moved - share * made[0]).abs().max()), float((moved - made[0]).abs().max())


@pytest.mark.parametrize("axes", [{}, {"replica": 2}], ids=str)
def test_one_delta_left_is_its_share_of_itself(run: Callable[..., Any], axes: Axes) -> None:
    for gap, from_whole in run(math.prod(axes.values()), one_left, axes):
        assert gap < 1e-15
        assert from_whole > 1e-4


def resumes(kind: str, axes: Axes, folder: Path) -> bool:
    first = trainer_of(kind, axes)
    go_on(first, 3)
    first.save(Saver(folder, first.mesh.world), {}, blocking=True)
    expected = go_on(first, 3)
    again = trainer_of(kind, axes, seed=9)
    found = latest(folder, again.mesh.world)
    assert found is not None
    again.resume(found)
    for one in again.objectives.values():
        one.steps = 3  # type: ignore[attr-defined]
    same = go_on(again, 3)
    return all(same[key] == expected[key] for key in ("losses", "shares", "steps")) and all(
        np.array_equal(a[-1], b[-1])
        for a, b in zip(same["weights"], expected["weights"], strict=True)
    )


@pytest.mark.parametrize("axes", [{}, {"replica": 2}], ids=str)
@pytest.mark.parametrize("kind", ["every step", "adaptive"])
def test_a_projection_resumes_exactly(
    run: Callable[..., Any], tmp_path: Path, kind: str, axes: Axes
) -> None:
    assert all(run(math.prod(axes.values()), resumes, kind, axes, tmp_path))
