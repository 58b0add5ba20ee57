"""Policy optimisation in any layout: the same samples, the same gradients, one stop for all."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grid import chunks

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "objectives"))
from rl_cases import TEMPLATE, WORDS, config, early_word, model, prompts, reinforcement, trainer_of

from megarlx.checkpoint import Saver, latest
from megarlx.comm.groups import Mesh
from megarlx.config.rollouts import BankConfig
from megarlx.data.prompts import PromptData
from megarlx.data.tokenizer import WordTokenizer
from megarlx.rollouts.bank import Bank
from megarlx.rollouts.rewards.rewards import RewardError
from megarlx.rollouts.rewards.sample import Sample
from megarlx.training.trainer import Trainer

LAYOUTS = [{"tp": 2}, {"pp": 2}, {"dp": 2}, {"pp": 2, "dp": 2}]
MOVING: dict[str, Any] = {
    "steps_per_rollout": 2,
    "epochs_per_rollout": 2,
    "policy": {"preset": "grpo"},
}


def mesh_of(axes: dict[str, int]) -> Mesh:
    return Mesh.build(**axes, timeout_seconds=30) if axes else Mesh.alone()


def size(axes: dict[str, int]) -> int:
    return int(np.prod(list(axes.values()))) if axes else 1


def standing_still(axes: dict[str, int], options: dict[str, Any]) -> dict[str, Any]:
    """Two rollouts at a learning rate of 0."""
    mesh = mesh_of(axes)
    one = reinforcement(config(**options), model(mesh=mesh))
    trainer = trainer_of(one, lr=0.0)
    gaps, tokens, rewards = [], [], []
    for _ in range(2):
        trainer.step()
        gaps.append(one.metrics()["rl/logprob_gap_max"])
        assert one.current is not None
        tokens.append(one.current.completions.tokens.tolist())
        rewards.append(one.current.rewards.tolist())
    return {"gaps": gaps, "tokens": tokens, "rewards": rewards, "work": vars(one.work)}


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_sampler_and_trainer_agree_in_every_layout(
    run: Callable[..., Any], axes: dict[str, int]
) -> None:
    found = run(size(axes), standing_still, axes, {})
    for rank in found:
        assert 0 < max(rank["gaps"]) <= 1e-5
        assert rank == found[0]


@pytest.mark.parametrize("prompts_per_step", [4, 3, 1])
def test_samples_do_not_depend_on_the_number_of_data_ranks(
    run: Callable[..., Any], prompts_per_step: int
) -> None:
    """One prompt for two ranks: one has nothing to sample."""
    options = {"prompts_per_step": prompts_per_step}
    (alone,) = run(1, standing_still, {}, options)
    for rank in run(2, standing_still, {"dp": 2}, options):
        for key in ("tokens", "rewards", "work"):
            assert rank[key] == alone[key], key


def banked(axes: dict[str, int], folder: Path) -> None:
    mesh = mesh_of(axes)
    one = reinforcement(config(), model(mesh=mesh))
    if mesh.model.is_first:
        one.sampler.bank = Bank(folder, BankConfig(), lambda: mesh.traffic.step)
    trainer = trainer_of(one, lr=0.0)
    for _ in range(2):
        trainer.step()


@pytest.mark.parametrize("axes", [{"tp": 2}, {"pp": 2, "dp": 2}], ids=str)
def test_a_bank_is_the_same_bytes_in_every_layout(
    run: Callable[..., Any], tmp_path: Path, axes: dict[str, int]
) -> None:
    run(1, banked, {}, tmp_path / "alone")
    run(size(axes), banked, axes, tmp_path / "ranks")
    alone, ranks = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("alone", "ranks")
    )
    assert sorted(alone) == ["step_00000000.jsonl.gz", "step_00000001.jsonl.gz"]
    assert ranks == alone


def drawn_by_difficulty(axes: dict[str, int]) -> dict[str, Any]:
    """Three rollouts, and one more of a run that goes on behind the second."""
    given = config(draw="difficulty", draw_decay=0.5, prompts_per_step=3)
    one, other = (reinforcement(given, model(mesh=mesh_of(axes))) for _ in range(2))
    for number in range(3):
        if number == 2:
            other.load_state(json.loads(json.dumps(one.state())))
            other.prepare()
        one.prepare()
        one.used = given.steps_of_a_rollout  # its step is left out
    prompts = one.sampler.prompts.state()
    assert other.sampler.prompts.state() == prompts
    return prompts


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_draws_by_difficulty_are_the_same_in_every_layout_and_resume_exactly(
    run: Callable[..., Any], axes: dict[str, int]
) -> None:
    (alone,) = run(1, drawn_by_difficulty, {})
    assert alone["solved"]
    assert alone["drawn_prompts"] == 9
    assert all(rank == alone for rank in run(size(axes), drawn_by_difficulty, axes))


def train(axes: dict[str, int], steps: int, preset: str) -> dict[str, Any]:
    mesh, given = mesh_of(axes), config(**{**MOVING, "policy": {"preset": preset}})
    one = reinforcement(given, model(mesh=mesh, dtype=torch.float64))
    trainer = trainer_of(one, lr=1e-3)
    losses, metrics, norms = [], [], []
    for _ in range(steps):
        found, report = trainer.step()
        losses.append(trainer.global_loss(found)["rl"])
        norms.append(float(report.gradient_norms["rl"]))
        metrics.append({k: v for k, v in one.metrics().items() if k[:5] != "perf/"})
    assert one.current is not None
    return {
        "losses": losses,
        "norms": norms,
        "metrics": metrics,
        "tokens": one.current.completions.tokens.tolist(),
        "weights": chunks(trainer, trainer.optimizer.master),
    }


def whole(parts: list[Any]) -> dict[str, np.ndarray]:
    found: dict[str, list[Any]] = {}
    for name, start, _, values in (chunk for part in parts for chunk in part):
        found.setdefault(name, []).append((start, values.reshape(-1)))
    return {
        name: np.concatenate([values for _, values in sorted(pieces, key=lambda p: p[0])])
        for name, pieces in found.items()
    }


@pytest.mark.parametrize("preset", ["grpo", "rloo"])  # the KL in the loss, and off the reward
@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_a_rollout_trains_the_same_weights_in_every_layout(
    run: Callable[..., Any], axes: dict[str, int], preset: str
) -> None:
    """Both epochs of a rollout and the next one's first step, in fp64."""
    (single,) = run(1, train, {}, 5, preset)
    ranks = run(size(axes), train, axes, 5, preset)
    for rank in ranks:
        assert rank["tokens"] == single["tokens"]
        np.testing.assert_allclose(rank["losses"], single["losses"], rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(rank["norms"], single["norms"], rtol=1e-8)
        for found, expected in zip(rank["metrics"], single["metrics"], strict=True):
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
    ours = {n: np.sort(v) for n, v in whole([rank["weights"] for rank in ranks]).items()}
    theirs = {n: np.sort(v) for n, v in whole([single["weights"]]).items()}
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        error = np.linalg.norm(ours[name] - weight) / np.linalg.norm(weight)
        assert error < 1e-9, f"{name}: {error}"


def resume_inside_of_a_rollout(axes: dict[str, int], folder: Path) -> bool:
    mesh = mesh_of(axes)

    def made(seed: int) -> Trainer:
        return trainer_of(reinforcement(config(**MOVING), model(seed, mesh=mesh)), lr=1e-2)

    first = made(3)
    for _ in range(6):
        first.step()
    saver = Saver(folder, mesh.world)
    first.save(saver, {}, blocking=True)
    expected = [first.global_loss(first.step()[0]) for _ in range(3)]
    second = made(8)
    found = latest(folder, mesh.world)
    assert found is not None
    second.resume(found)
    same = [second.global_loss(second.step()[0]) for _ in range(3)] == expected
    return same and all(
        torch.equal(a, b)
        for a, b in zip(
            second.optimizer.shards.shards.values(),
            first.optimizer.shards.shards.values(),
            strict=True,
        )
    )


@pytest.mark.parametrize("axes", [{"dp": 2}, {"tp": 2}, {"pp": 2}], ids=str)
def test_a_run_resumes_inside_of_a_rollout_bit_for_bit(
    run: Callable[..., Any], tmp_path: Path, axes: dict[str, int]
) -> None:
    assert all(run(size(axes), resume_inside_of_a_rollout, axes, tmp_path))


def failing_for_some(samples: list[Sample]) -> list[float]:
    """For the second prompt drawn, which only one data rank has."""
    data = PromptData(prompts(), TEMPLATE, WordTokenizer(WORDS), 5, name="rl")
    second = data.take(2)[1].prompt
    if any(sample.prompt == second.question for sample in samples):
        raise RuntimeError("the judge of this one is away")
    return early_word(samples)


def stopped(axes: dict[str, int], rewards: list[str], workers: int) -> str:
    """Each data rank with a reward of its own."""
    mesh = mesh_of(axes)
    reward = {"function": rewards[mesh.dp.rank], "workers": workers, "name": "judge"}
    one = reinforcement(config(rewards=[reward]), model(mesh=mesh))
    try:
        trainer_of(one).step()
    except RewardError as error:
        return str(error)
    finally:
        one.close()
    return ""


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_a_reward_that_fails_on_one_rank_stops_all_with_its_message(
    run: Callable[..., Any], axes: dict[str, int]
) -> None:
    for said in run(size(axes), stopped, axes, ["test_rl_layouts:failing_for_some"] * 2, 0):
        assert "failed on 4 of 16 samples; allowed are 10%" in said
        assert "the judge of this one is away" in said


@pytest.mark.parametrize("axes", [{"dp": 2}, {"dp": 2, "tp": 2}], ids=str)
def test_a_reward_that_cannot_be_started_on_one_rank_stops_all(
    run: Callable[..., Any], axes: dict[str, int]
) -> None:
    rewards = ["rl_cases:early_word", "nowhere_to_be_found:reward"]
    for said in run(size(axes), stopped, axes, rewards, 1):
        assert "reward nowhere_to_be_found:reward: could not start" in said
