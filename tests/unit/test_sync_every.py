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
from megarlx.config.stages import OuterConfig, StageConfig
from megarlx.config.timeline import Timeline
from megarlx.training.outer import Outer
from megarlx.training.shares import Adaptation, Course, Shares
from megarlx.training.stages import TrainingStage
from megarlx.training.trainer import Trainer

WORLD = Group.alone("world")
SHARES = {"a": Course(1.0, 3.0), "b": Course(2.0, 2.0), "c": Course(1.0, 1.0)}


def trainer_of(
    names: Any,
    every: int,
    dtype: torch.dtype = torch.float64,
    seed: int = 1,
    outer: Outer | None = None,
    **options: Any,
) -> Trainer:
    base = stage_of(names, **options)
    stage = TrainingStage(
        list(base.members.values()),
        steps=base.times.steps,
        shares=base.shares,
        sync_every=every,
        outer=outer,
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
    outer: Outer | None = None,
) -> dict[str, Tensor]:
    """Each objective goes on by itself; then the weighted sum of the ways they went is applied, by
    SGD with Nesterov's momentum where there is an outer step."""
    book = Textbook({name: ADAMS[name] for name in names})
    made = {name: objective(name, scale=scales.get(name)) for name in names}
    common = book.weights
    own = dict.fromkeys(names, common)
    leaves = {n: w.clone().requires_grad_() for n, w in common.items()}
    sgd = None
    if outer is not None:
        settings = {"lr": outer.rate, "momentum": outer.momentum}
        sgd = torch.optim.SGD(leaves.values(), **settings, nesterov=outer.momentum > 0)
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
            if sgd is not None:
                for n, leaf in leaves.items():
                    leaf.grad = leaf.detach() - common[n]
                sgd.step()
                common = {n: leaf.detach().clone() for n, leaf in leaves.items()}
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


@pytest.mark.parametrize("outer", [Outer(0.9, 0.7), Outer(0.0, 0.5), Outer(0.5, 1.0)], ids=str)
def test_an_outer_step_is_sgd_with_nesterovs_momentum_on_the_average(outer: Outer) -> None:
    courses = {name: SHARES[name] for name in "ab"}
    trainer = trainer_of("ab", 2, steps=9, shares=Shares(courses, 9), outer=outer)
    run(trainer, 9)
    expected = by_the_book("ab", 9, 2, Shares(courses, 9).at, {}, outer)
    assert_same_weights(trainer.model, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_outer_step_without_momentum_at_rate_1_is_the_average_bit_for_bit(
    dtype: torch.dtype,
) -> None:
    plain, outer = (trainer_of("ab", 2, dtype, outer=one) for one in (None, Outer(0.0, 1.0)))
    assert run(plain, 6) == run(outer, 6)
    one, other = ([t.optimizer.master, t.model.data_parallel.weights] for t in (plain, outer))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_outer_steps_need_local_steps_of_several_objectives() -> None:
    stage = {"steps": 4, "outer": {"momentum": 0.5}, "objectives": {"sft": {}, "rl": {}}}
    local = stage | {"combine": "average", "sync_every": 2}
    assert StageConfig.model_validate(local).outer == OuterConfig(momentum=0.5, rate=0.7)
    with pytest.raises(ValidationError, match=r"outer: is given with sync_every = 1; it needs"):
        StageConfig.model_validate(local | {"sync_every": 1})
    with pytest.raises(ValidationError, match="outer: is for combine = 'average' only"):
        StageConfig.model_validate(stage | {"objectives": {"rl": {}}})
    with pytest.raises(ValidationError, match=r"'average' with 1 objectives; it takes two"):
        StageConfig.model_validate(local | {"objectives": {"rl": {}}})
    with pytest.raises(ValueError, match="outer is given with sync_every 1"):
        TrainingStage([], outer=Outer(0.9, 0.7))


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


@pytest.mark.parametrize("outer", [None, Outer(0.9, 0.7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_at_an_average_is_exact(
    tmp_path: Path, dtype: torch.dtype, outer: Outer | None
) -> None:
    whole = trainer_of("ab", 3, dtype, outer=outer)
    run(whole, 3)
    whole.save(Saver(tmp_path, WORLD), {}, blocking=True)
    expected = run(whole, 5)
    again = trainer_of("ab", 3, dtype, seed=7, outer=outer)
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
