"""Local steps between averages, in one process, against torch.optim.AdamW in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from stage_cases import (
    ADAMS,
    RATES,
    Textbook,
    assert_same_weights,
    objective,
    parameters_of,
    small_model,
    stage_of,
)
from torch import Tensor

from megarlx.checkpoint import Saver
from megarlx.comm.groups import Group
from megarlx.config.objectives import StageConfig
from megarlx.config.timeline import Timeline
from megarlx.training.shares import Adaptation, Course, Shares
from megarlx.training.stages import TrainingStage
from megarlx.training.trainer import Trainer

WORLD = Group.alone("world")
SHARES = {"a": Course(1.0, 3.0), "b": Course(2.0, 2.0), "c": Course(1.0, 1.0)}


def trainer_of(
    names: Any, every: int, dtype: torch.dtype = torch.float64, seed: int = 1, **options: Any
) -> Trainer:
    base = stage_of(names, **options)
    stage = TrainingStage(
        list(base.members.values()), steps=base.times.steps, shares=base.shares, sync_every=every
    )
    return Trainer(small_model(seed, dtype), [stage])


def run(trainer: Trainer, steps: int) -> list[dict[str, float]]:
    return [trainer.global_loss(trainer.step()[0]) for _ in range(steps)]


def by_the_book(
    names: str,
    steps: int,
    every: int,
    shares: Callable[[int], dict[str, float]],
    scales: dict[str, Callable[[int], float]],
) -> dict[str, Tensor]:
    """Each objective goes on by itself; then the weighted sum of the ways they went is applied."""
    book = Textbook({name: ADAMS[name] for name in names})
    made = {name: objective(name, scale=scales.get(name)) for name in names}
    common = book.weights
    own = dict.fromkeys(names, common)
    for step in range(steps):
        for name in names:
            book.weights = own[name]
            gradients = book.gradients(made[name])
            if all(torch.isfinite(g).all() for g in gradients.values()):
                book.add(book.update(name, gradients, RATES[name](step)))
            own[name] = book.weights
        if (step + 1) % every == 0 or step + 1 == steps:
            ways = {x: {n: own[x][n] - w for n, w in common.items()} for x in names}
            for name in names:
                common = {n: w + shares(step)[name] * ways[name][n] for n, w in common.items()}
            own = dict.fromkeys(names, common)
    return common


@pytest.mark.parametrize("names", ["ab", "abc"])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_an_average_is_the_weighted_sum_of_the_ways_the_objectives_went_alone(
    names: str, every: int
) -> None:
    """Seven steps: the last average of a stage comes early."""
    courses = {name: SHARES[name] for name in names}
    trainer = trainer_of(names, every, steps=7, shares=Shares(courses, 7))
    run(trainer, 7)
    expected = by_the_book(names, 7, every, Shares(courses, 7).at, {})
    assert_same_weights(trainer.model, expected)


def test_local_steps_are_not_averages_at_every_step() -> None:
    every_step, local = trainer_of("ab", 1), trainer_of("ab", 3)
    run(every_step, 3), run(local, 3)
    name = "layers.0.attention.o.weight"
    one, other = (parameters_of(t.model)[name] for t in (every_step, local))
    assert (one - other).norm() > 1e-4 * one.norm()


def test_a_local_step_that_is_not_finite_skips_that_step_of_that_objective() -> None:
    def broken(step: int) -> float:
        return math.inf if step == 1 else 1.0

    trainer = trainer_of(["a", objective("b", scale=broken)], 3)
    flags = []
    for _ in range(6):
        _, report = trainer.step()
        flags.append([int(flag) for flag in report.found_inf.values()])
    assert flags == [[0, int(step == 1)] for step in range(6)]
    half = {"a": 0.5, "b": 0.5}
    expected = by_the_book("ab", 6, 3, lambda step: half, {"b": broken})
    assert_same_weights(trainer.model, expected)
    assert trainer.optimizer.steps.tolist() == [6, 5]


def test_adaptive_shares_observe_the_steps_that_are_averaged() -> None:
    rule = Adaptation(0.5, 2.0, 0.1)
    courses = {name: Course() for name in "ab"}
    trainer = trainer_of("ab", 2, shares=Shares(courses, None, rule))
    seen, reference, first = [], Shares(courses, None, rule), {}
    for step in range(6):
        expected = reference.at(step)
        losses = trainer.global_loss(trainer.step()[0])
        assert trainer.last_shares == expected
        seen.append(tuple(expected.values()))
        if step % 2:
            first = first or losses
            reference.observe({name: losses[name] / first[name] for name in losses})
    assert seen[0] == seen[1] != seen[4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_at_an_average_is_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = trainer_of("ab", 3, dtype)
    run(whole, 3)
    whole.save(Saver(tmp_path, WORLD), {}, blocking=True)
    expected = run(whole, 5)
    again = trainer_of("ab", 3, dtype, seed=7)
    again.resume(tmp_path / "iter_00000003")
    assert run(again, 5) == expected
    assert run(again, 1) == run(whole, 1)
    for found, wanted in zip(
        again.optimizer.shards.shards.values(), whole.optimizer.shards.shards.values(), strict=True
    ):
        assert torch.equal(found, wanted)
    assert torch.equal(again.model.data_parallel.weights, whole.model.data_parallel.weights)


def test_between_two_averages_nothing_is_saved(tmp_path: Path) -> None:
    trainer = trainer_of("ab", 3)
    for step in range(1, 5):
        run(trainer, 1)
        assert trainer.in_sync == (step == 3)
    with pytest.raises(ValueError, match=r"step 4 is 4 steps into .* multiples of 3"):
        trainer.save(Saver(tmp_path, WORLD), {}, blocking=True)


def test_a_checkpoint_waits_for_the_next_average_or_the_end_of_its_stage() -> None:
    two = {"sft": {}, "rl": {}}
    stages = [
        StageConfig.model_validate({"steps": 4, "objectives": {"sft": {}}}),
        StageConfig.model_validate(
            {"steps": 8, "combine": "average", "sync_every": 3, "objectives": two}
        ),
    ]

    timeline = Timeline([stage.times for stage in stages])
    found = [timeline.next_average(step) for step in range(13)]
    assert found == [0, 1, 2, 3, 4, 7, 7, 7, 10, 10, 10, 12, 12]


def test_one_adam_for_all_takes_no_local_steps() -> None:
    two = {"sft": {}, "rl": {}}
    stage = {"steps": 4, "combine": "average", "sync_every": 3, "objectives": two}
    StageConfig.model_validate(stage)
    with pytest.raises(ValidationError, match="sync_every: is 3; with of = 'gradients' it is 1"):
        StageConfig.model_validate(stage | {"of": "gradients"})
    with pytest.raises(ValueError, match="sync_every is 3; objectives with one state"):
        TrainingStage([], shared_moments=True, sync_every=3)
