"""Replicas, each with one objective's ranks and moments, train what one process trains, in fp64.

Letters: a, b and c are objectives, each with other data, another AdamW and another rate.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grid import RandomSequences, assemble, chunks, model
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "objectives"))
import rl_cases
import stage_cases
from stage_cases import ADAMS, RATES, Numbers, Scaled, Textbook

from megarlx.checkpoint import Saver, latest
from megarlx.comm.groups import Mesh
from megarlx.data.loader import BatchLayout, Loader
from megarlx.data.samples import Sample
from megarlx.model.build import build_model
from megarlx.objectives.policy import Reinforcement
from megarlx.objectives.supervised import Supervised
from megarlx.training.parts import UpdateSettings
from megarlx.training.shares import Adaptation, Course, Shares
from megarlx.training.stages import TrainedObjective, TrainingStage
from megarlx.training.trainer import Trainer

Axes = dict[str, int]
COURSES = {"a": Course(1.0, 3.0), "b": Course(2.0, 2.0), "c": Course(1.0, 1.0)}
STEPS = 5


def mesh_of(axes: Axes) -> Mesh:
    return Mesh.build(**axes, timeout_seconds=30) if axes else Mesh.alone()


def size(axes: Axes) -> int:
    return math.prod(axes.values())


def broken(step: int) -> float:
    return math.inf if step == 1 else 1.0


class Shifted(RandomSequences):
    def __init__(self, name: str) -> None:
        self.shift = 10_000 * (ord(name) - ord("a"))

    def sample(self, index: int) -> Sample:
        return super().sample(index + self.shift)


def stages_of(kind: str, mesh: Mesh) -> list[TrainingStage]:
    names = "abc" if kind == "three" else "ab"
    sequences = 8
    dealt = BatchLayout(sequences, 2 if mesh.dp.size == 1 else 1, mesh.dp.rank, mesh.dp.size)
    placed: dict[str, Any] = {
        "placement": "replicas" if mesh.replica.size > 1 else "colocated",
        "sync_every": 3 if kind == "local" else 1,
    }
    one_adam = kind in ("gradients", "broken gradients")
    members = {}
    for name in names:
        made = Scaled(name, Loader(Shifted(name), dealt, prefetch_steps=0))
        if kind.startswith("broken") and name == "b":
            made.scale = broken
        adam, rate = (ADAMS["a"], RATES["a"]) if one_adam else (ADAMS[name], RATES[name])
        members[name] = TrainedObjective(made, adam, rate)
    adaptation = Adaptation(0.5, 3.0, 0.1) if kind == "adaptive" else None
    shares = Shares({name: COURSES[name] for name in names}, STEPS, adaptation)
    average = TrainingStage(
        list(members.values()), shares=shares, steps=STEPS, shared_moments=one_adam, **placed
    )
    if kind != "stages":
        return [average]
    a, b = members["a"], members["b"]
    going_on = [
        TrainedObjective(o.objective, o.settings, o.learning_rate, inherit=True) for o in (b, a)
    ]
    return [
        TrainingStage([a], steps=2, combine="single"),
        TrainingStage([going_on[1], b], steps=2, **placed),
        TrainingStage([going_on[0]], steps=2, combine="single"),
        TrainingStage(going_on, steps=2, **placed),
        TrainingStage(going_on, steps=2, combine="alternate"),
    ]


def trainer_of(kind: str, axes: Axes, seed: int = 7) -> Trainer:
    mesh = mesh_of(axes)
    built = build_model(
        model("llama3", tied=False), mesh, seed=seed, dtype=torch.float64, bucket_elements=5000
    )
    return Trainer(built, stages_of(kind, mesh))


def go_on(trainer: Trainer, steps: int) -> dict[str, Any]:
    losses, norms, shares, flags = [], [], [], []
    for _ in range(steps):
        found, report = trainer.step()
        losses += trainer.global_loss(found).values()
        norms += [float(norm) for norm in report.gradient_norms.values()]
        flags += [int(flag) for flag in report.found_inf.values()]
        shares += (trainer.last_shares or {}).values()
    trainer.replicas.share_counts()
    return {
        "losses": losses,
        "norms": norms,
        "flags": flags,
        "shares": shares,
        "tokens": {name: float(count) for name, count in trainer.tokens.items()},
        "steps": trainer.optimizer.state(),
        "metrics": trainer.replicas.metrics(trainer.stage.members),
        "moments": {
            n: chunks(trainer, m["exp_avg_sq"]) for n, m in trainer.optimizer.kept.shards.items()
        },
        "weights": chunks(trainer, trainer.optimizer.master),
        "model": trainer.model.data_parallel.weights.clone(),
        "replica": trainer.mesh.replica.rank,
        "place": (trainer.mesh.pp.rank, trainer.mesh.dp.rank, trainer.mesh.tp.rank),
    }


def train(kind: str, axes: Axes, steps: int) -> dict[str, Any]:
    return go_on(trainer_of(kind, axes), steps)


def compare(single: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    """Weights, moments, and whatever is told on rank 0 or on any other."""
    config = model("llama3", tied=False)
    expected = assemble(config, [single["weights"]])
    found = assemble(config, [rank["weights"] for rank in ranks if rank["replica"] == 0])
    for name, weight in expected.items():
        error = np.linalg.norm(found[name] - weight) / np.linalg.norm(weight)
        assert error < 1e-9, f"{name}: {error}"
    for rank in ranks:
        twin = next(other for other in ranks if other["place"] == rank["place"])
        assert torch.equal(rank["model"], twin["model"])
        np.testing.assert_allclose(rank["losses"], single["losses"], rtol=1e-10)
        np.testing.assert_allclose(rank["norms"], single["norms"], rtol=1e-9)
        np.testing.assert_allclose(rank["shares"], single["shares"], rtol=1e-10)
        for key in ("flags", "tokens", "steps", "metrics"):
            assert rank[key] == single[key], key
    for owner, moments in single["moments"].items():
        holders = [rank for rank in ranks if owner in rank["moments"]]
        first = [rank for rank in holders if rank["replica"] == holders[0]["replica"]]
        whole = assemble(config, [rank["moments"][owner] for rank in first])
        for name, moment in assemble(config, [moments]).items():
            np.testing.assert_allclose(whole[name], moment, rtol=1e-8, atol=1e-20, err_msg=name)


TWO, THREE = {"replica": 2}, {"replica": 3}
CASES: list[tuple[str, Axes]] = [
    ("average", TWO),
    ("average", {"replica": 2, "dp": 2}),
    ("average", {"replica": 2, "tp": 2}),
    ("average", {"replica": 2, "pp": 2}),
    ("three", THREE),
    ("adaptive", {"replica": 2, "dp": 2}),
    ("gradients", TWO),
    ("gradients", {"replica": 2, "tp": 2}),
    ("local", TWO),
    ("local", {"replica": 2, "dp": 2}),
    ("broken", {"replica": 2, "dp": 2}),
    ("broken gradients", TWO),
]


@pytest.mark.parametrize(("kind", "axes"), CASES, ids=str)
def test_replicas_train_what_one_process_trains(
    run: Callable[..., Any], kind: str, axes: Axes
) -> None:
    (single,) = run(1, train, kind, {}, STEPS)
    ranks = run(size(axes), train, kind, axes, STEPS)
    compare(single, ranks)
    if kind not in ("gradients", "broken gradients"):
        for rank in ranks:
            assert list(rank["moments"]) == ["abc"[rank["replica"]]]


@pytest.mark.parametrize("axes", [TWO, {"replica": 2, "dp": 2}], ids=str)
def test_objectives_go_on_from_stages_with_replicas_to_stages_without_and_back(
    run: Callable[..., Any], axes: Axes
) -> None:
    """Stages without them use the replicas for data parallelism."""
    (single,) = run(1, train, "stages", {}, 10)
    compare(single, run(size(axes), train, "stages", axes, 10))


# Against the algorithm as it is written down.


def small(names: str, every: int) -> dict[str, Tensor]:
    mesh = Mesh.build(replica=len(names), timeout_seconds=30)
    members = [
        TrainedObjective(
            Supervised(name, Loader(Numbers(name), BatchLayout(4, 4), prefetch_steps=0)),
            ADAMS[name],
            RATES[name],
        )
        for name in names
    ]
    stage = TrainingStage(members, placement="replicas", sync_every=every)
    trainer = Trainer(stage_cases.small_model(mesh=mesh), [stage])
    for _ in range(6):
        trainer.step()
    return stage_cases.parameters_of(trainer.model)


@pytest.mark.parametrize(("names", "every"), [("ab", 1), ("abc", 1), ("ab", 3)])
def test_replicas_do_what_deep_copies_with_torch_adamw_do(
    run: Callable[..., Any], names: str, every: int
) -> None:
    book = Textbook({name: ADAMS[name] for name in names})
    made = {name: stage_cases.objective(name) for name in names}
    common = book.weights
    own = dict.fromkeys(names, common)
    for step in range(6):
        for name in names:
            book.weights = own[name]
            book.add(book.update(name, book.gradients(made[name]), RATES[name](step)))
            own[name] = book.weights
        if (step + 1) % every == 0:
            common = {
                n: w + torch.stack([own[x][n] - w for x in names]).mean(0)
                for n, w in common.items()
            }
            own = dict.fromkeys(names, common)
    for found in run(len(names), small, names, every):
        for name, weight in found.items():
            error = (weight - common[name]).norm() / common[name].norm().clamp_min(1e-12)
            assert error < 1e-10, f"{name}: {error}"


# Checkpoints.


def save_and_go_on(kind: str, axes: Axes, folder: Path, before: int) -> dict[str, Any]:
    trainer = trainer_of(kind, axes)
    go_on(trainer, before)
    trainer.save(Saver(folder, trainer.mesh.world), {}, blocking=True)
    return go_on(trainer, 2)


def resume_and_go_on(kind: str, axes: Axes, folder: Path) -> dict[str, Any]:
    trainer = trainer_of(kind, axes, seed=8)
    found = latest(folder, trainer.mesh.world)
    assert found is not None
    trainer.resume(found)
    return go_on(trainer, 2)


LOADS: list[tuple[str, Axes, Axes]] = [
    ("average", {}, TWO),
    ("average", TWO, {}),
    ("average", {"replica": 2, "dp": 2}, {"tp": 2}),
    ("average", {"dp": 2}, {"replica": 2, "tp": 2}),
    ("gradients", TWO, {"dp": 2}),
    ("local", {"dp": 2}, TWO),
]


@pytest.mark.parametrize(("kind", "source", "target"), LOADS, ids=str)
def test_colocated_goes_on_in_replicas_and_back(
    run: Callable[..., Any], tmp_path: Path, kind: str, source: Axes, target: Axes
) -> None:
    before = 3
    expected = run(size(source), save_and_go_on, kind, source, tmp_path, before)[0]
    (single,) = run(1, resume_and_go_on, kind, {}, tmp_path)
    np.testing.assert_allclose(single["losses"], expected["losses"], rtol=1e-11)
    compare(single, run(size(target), resume_and_go_on, kind, target, tmp_path))


@pytest.mark.parametrize("kind", ["average", "gradients", "local", "stages"])
def test_replicas_resume_exactly(run: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    axes = {"replica": 2, "dp": 2}
    expected = run(4, save_and_go_on, kind, axes, tmp_path, 3)
    for found, wanted in zip(run(4, resume_and_go_on, kind, axes, tmp_path), expected, strict=True):
        assert torch.equal(found["model"], wanted["model"])
        for key in ("losses", "norms", "shares", "tokens", "steps", "metrics"):
            assert found[key] == wanted[key], key


# Policy optimisation in a replica.

MOVING = {"steps_per_rollout": 2, "epochs_per_rollout": 2, "policy": {"preset": "grpo"}}


class Words(Numbers):
    sequence_length = 12

    def sample(self, index: int) -> Sample:
        tokens = np.random.default_rng(index).integers(0, rl_cases.VOCABULARY, 13)
        return Sample(tokens[:-1], tokens[1:], None, (12,), 0)


def policy_trainer(axes: Axes, options: dict[str, Any], seed: int = 3) -> Trainer:
    mesh = mesh_of(axes)
    policy = rl_cases.model(seed, torch.float64, mesh)
    given = rl_cases.config(**MOVING)
    rl = rl_cases.reinforcement(given, policy)
    sft = Supervised(
        "sft",
        Loader(Words("sft"), BatchLayout(4, 2, mesh.dp.rank, mesh.dp.size), prefetch_steps=0),
    )
    adam = UpdateSettings(weight_decay=0.0)
    members = [TrainedObjective(o, adam, lambda step: 1e-3) for o in (sft, rl)]
    if axes.get("replica"):
        options = {"placement": "replicas", **options}
    courses = Shares({"sft": Course(), "rl": Course()}, None, Adaptation(0.5, 1.0, 0.1))
    return Trainer(policy, [TrainingStage(members, shares=courses, **options)])


def policy_steps(trainer: Trainer, steps: int) -> dict[str, Any]:
    found = go_on(trainer, steps)
    del found["moments"]
    found["metrics"] = {k: v for k, v in found["metrics"].items() if k[:5] != "perf/"}
    rl = trainer.objectives["rl"]
    assert isinstance(rl, Reinforcement)
    found |= {"work": vars(rl.work), "rollouts": rl.rollouts}
    return found


def train_policy(axes: Axes, options: dict[str, Any], steps: int) -> dict[str, Any]:
    return policy_steps(policy_trainer(axes, options), steps)


def parts(ranks: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The sorted numbers of every tensor, out of the shards of one replica."""
    found: dict[str, list[np.ndarray]] = {}
    for rank in ranks:
        for name, _, _, values in rank["weights"] if rank["replica"] == 0 else ():
            found.setdefault(name, []).append(values.reshape(-1))
    return {name: np.sort(np.concatenate(held)) for name, held in found.items()}


@pytest.mark.parametrize(
    ("axes", "options"),
    [
        (TWO, {}),
        ({"replica": 2, "dp": 2}, {}),
        ({"replica": 2, "tp": 2}, {}),
        ({"replica": 2, "dp": 2}, {"generate_together": False}),
        (TWO, {"sync_every": 2}),
    ],
    ids=str,
)
def test_a_policy_in_a_replica_learns_the_same_from_the_same_samples(
    run: Callable[..., Any], axes: Axes, options: dict[str, Any]
) -> None:
    """Two rollouts of four steps each, made by all replicas or by the policy's alone."""
    local = {k: v for k, v in options.items() if k == "sync_every"}
    (single,) = run(1, train_policy, {}, local, 6)
    ranks = run(size(axes), train_policy, axes, options, 6)
    wanted, found = parts([single]), parts(ranks)
    for name, weight in wanted.items():
        assert np.linalg.norm(found[name] - weight) < 1e-9 * np.linalg.norm(weight), name
    helped = not options
    for rank in ranks:
        np.testing.assert_allclose(rank["losses"], single["losses"], rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(rank["shares"], single["shares"], rtol=1e-8)
        assert rank["metrics"] == pytest.approx(single["metrics"], rel=1e-6, abs=1e-6)
        assert (rank["tokens"], rank["work"]) == (single["tokens"], single["work"])
        assert rank["rollouts"] == (2 if helped or rank["replica"] == 1 else 0)


def policy_resumes(axes: Axes, options: dict[str, Any], folder: Path) -> bool:
    first = policy_trainer(axes, options)
    policy_steps(first, 6)  # inside of the second rollout
    saver = Saver(folder, first.mesh.world)
    first.save(saver, {}, blocking=True)
    expected = policy_steps(first, 4)
    again = policy_trainer(axes, options, seed=9)
    found = latest(folder, again.mesh.world)
    assert found is not None
    again.resume(found)
    same = policy_steps(again, 4)
    assert torch.equal(same["model"], expected["model"])
    keys = ("losses", "norms", "shares", "tokens", "work", "metrics")
    return all(same[key] == expected[key] for key in keys)


@pytest.mark.parametrize("options", [{}, {"generate_together": False}, {"sync_every": 3}], ids=str)
def test_a_policy_in_a_replica_resumes_inside_of_a_rollout(
    run: Callable[..., Any], tmp_path: Path, options: dict[str, Any]
) -> None:
    assert all(run(2, policy_resumes, TWO, options, tmp_path))


def refused(objectives: int) -> str:
    mesh = Mesh.build(replica=2, timeout_seconds=30)
    members = [
        TrainedObjective(
            Supervised(name, Loader(Numbers(name), BatchLayout(4, 4), prefetch_steps=0)),
            ADAMS[name],
            RATES[name],
        )
        for name in "abc"[:objectives]
    ]
    try:
        Trainer(stage_cases.small_model(mesh=mesh), [TrainingStage(members, placement="replicas")])
    except ValueError as error:
        return str(error)
    return ""


def test_another_number_of_replicas_than_of_objectives_is_refused(run: Callable[..., Any]) -> None:
    said = run(2, refused, 3)
    assert said == ["3 objectives (a, b, c) need 3 replicas, one each; the mesh has replica=2"] * 2
