"""Reinforcement learning over several turns in any layout: the same episodes and gradients."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grid import chunks
from test_rl_layouts import mesh_of, size, whole

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "objectives"))
from agent_cases import agent_config, agents, model, played_both_ways, tasks, told
from rl_cases import trainer_of

from megarlx.checkpoint import Saver, latest
from megarlx.rollouts.environments.process import BrokenEnvironment
from megarlx.training.trainer import Trainer

LAYOUTS = [{"tp": 2}, {"pp": 2}, {"dp": 2}]
MOVING: dict[str, Any] = {
    "steps_per_rollout": 2,
    "epochs_per_rollout": 2,
    "policy": {"preset": "sampo"},
}


def both_ways(axes: dict[str, int], numbers: range) -> list[Any]:
    """What each rank holds of the same random cases, answered and acted."""
    found, mesh = [], mesh_of(axes)
    for number in numbers:
        answered, acted, _ = played_both_ways(number, model(mesh=mesh))
        found.append(([told(one) for one in answered], [told(one) for one in acted]))
    return found


@pytest.mark.parametrize("axes", [*LAYOUTS, {"tp": 2, "pp": 2}], ids=str)
def test_one_turn_is_an_episode_of_one_turn(run: Callable[..., Any], axes: dict[str, int]) -> None:
    """Every rank of a copy of the model holds the same, and all together what one process does."""
    numbers = range(8)
    (alone,) = run(1, both_ways, {}, numbers)
    ranks = run(size(axes), both_ways, axes, numbers)
    copies = axes.get("dp", 1)
    for number in numbers:
        for answered, acted in (rank[number] for rank in ranks):
            assert answered == acted
        if copies == 1:
            assert all(rank[number] == ranks[0][number] for rank in ranks)
        held = {one["id"]: one["tokens"] for rank in ranks for one in rank[number][0]}
        expected = {one["id"]: one["tokens"] for one in alone[number][0]}
        assert held.keys() == expected.keys()
        differing = [i for i in expected if held[i] != expected[i]]
        assert len(differing) <= 0.04 * len(expected), differing  # rounding of a split product


def train(axes: dict[str, int], steps: int, changes: dict[str, Any]) -> dict[str, Any]:
    one = agents(agent_config(**changes), model(mesh=mesh_of(axes), dtype=torch.float64))
    trainer = trainer_of(one, lr=1e-3)
    losses, metrics = [], []
    for _ in range(steps):
        losses.append(trainer.global_loss(trainer.step()[0])["rl"])
        metrics.append({k: v for k, v in one.metrics().items() if k[:5] != "perf/"})
    assert one.current is not None
    return {
        "losses": losses,
        "metrics": metrics,
        "tokens": one.current.completions.tokens.tolist(),
        "weights": chunks(trainer, trainer.optimizer.master),
    }


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_episodes_train_the_same_weights_in_every_layout(
    run: Callable[..., Any], axes: dict[str, int]
) -> None:
    (single,) = run(1, train, {}, 5, MOVING)
    ranks = run(size(axes), train, axes, 5, MOVING)
    for rank in ranks:
        assert rank["tokens"] == single["tokens"]
        np.testing.assert_allclose(rank["losses"], single["losses"], rtol=1e-8, atol=1e-12)
        for found, expected in zip(rank["metrics"], single["metrics"], strict=True):
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
    ours = {n: np.sort(v) for n, v in whole([rank["weights"] for rank in ranks]).items()}
    for name, weight in whole([single["weights"]]).items():
        error = np.linalg.norm(ours[name] - np.sort(weight)) / np.linalg.norm(weight)
        assert error < 1e-9, f"{name}: {error}"


def test_a_data_rank_without_a_task_plays_nothing_and_learns_the_same(
    run: Callable[..., Any],
) -> None:
    (single,) = run(1, train, {}, 2, {"prompts_per_step": 1})
    for rank in run(2, train, {"dp": 2}, 2, {"prompts_per_step": 1}):
        assert rank["tokens"] == single["tokens"]
        np.testing.assert_allclose(rank["losses"], single["losses"], rtol=1e-8, atol=1e-12)


def resume_inside_of_a_rollout(axes: dict[str, int], folder: Path) -> bool:
    mesh = mesh_of(axes)

    def made(seed: int) -> Trainer:
        return trainer_of(agents(agent_config(**MOVING), model(seed, mesh=mesh)), lr=1e-2)

    first = made(3)
    for _ in range(6):
        first.step()
    first.save(Saver(folder, mesh.world), {}, blocking=True)
    expected = [first.global_loss(first.step()[0]) for _ in range(3)]
    second = made(8)
    found = latest(folder, mesh.world)
    assert found is not None
    second.resume(found)
    return [second.global_loss(second.step()[0]) for _ in range(3)] == expected


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_a_run_resumes_inside_of_a_rollout_of_episodes(
    run: Callable[..., Any], tmp_path: Path, axes: dict[str, int]
) -> None:
    assert all(run(size(axes), resume_inside_of_a_rollout, axes, tmp_path))


def stopped(axes: dict[str, int]) -> str:
    """One task in four cannot begin: it is on one data rank only."""
    one = agents(agent_config(), model(mesh=mesh_of(axes)), questions=tasks(4, broken=[1]))
    try:
        trainer_of(one).step()
    except BrokenEnvironment as error:
        return str(error)
    return ""


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_too_many_lost_episodes_on_one_rank_stop_all(
    run: Callable[..., Any], axes: dict[str, int]
) -> None:
    for message in run(size(axes), stopped, axes):
        assert message.startswith("environment agent_cases:Early: lost 4 of 16 episodes")
