"""Runs of several stages stop and go on anywhere, and objectives go on across stages between."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_cases import ADAMS, RATES, objective, parameters_of, small_model, stage_of
from torch import Tensor

from megarlx.checkpoint import CheckpointError, Saver
from megarlx.comm.groups import Group
from megarlx.objectives.interface import Objective
from megarlx.ops import Head, LossInputs, TokenLoss
from megarlx.training.parts import UpdateSettings
from megarlx.training.shares import Adaptation, Course, Shares
from megarlx.training.trainer import Trainer, TrainingStage

WORLD = Group.alone("world")
SAME: dict[str, Any] = {
    "adams": dict.fromkeys("abc", ADAMS["a"]),
    "rates": dict.fromkeys("abc", RATES["a"]),
}
ADAPTIVE = Adaptation(0.3, 2.0, 0.1)


def every_kind_of_stage(dtype: torch.dtype = torch.float32, seed: int = 1) -> Trainer:
    a, b, c = (objective(name) for name in "abc")

    def courses(names: str) -> dict[str, Course]:
        return {name: Course(1.0, 2.0) for name in names}

    stages = [
        stage_of([a], steps=3, combine="single"),
        stage_of([b, c], steps=5, combine="alternate", turns={"b": 2, "c": 1}),
        stage_of([a, b], steps=4, inherit="a", shares=Shares(courses("ab"), 4, ADAPTIVE)),
        stage_of([b, c], steps=3, inherit="b", of_gradients=True, **SAME),
        stage_of([b, c], steps=3, inherit="bc", of_gradients=True, **SAME),
        stage_of([a, b, c], steps=3, inherit="a", shares=Shares(courses("abc"), 3)),
    ]
    return Trainer(small_model(seed, dtype), stages)


TOTAL = 21


def run(trainer: Trainer, steps: int) -> list[dict[str, float]]:
    return [trainer.global_loss(trainer.step()[0]) for _ in range(steps)]


def everything(trainer: Trainer) -> list[Tensor]:
    optimizer = trainer.optimizer
    return [*optimizer.shards.shards.values(), optimizer.steps, trainer.model.data_parallel.weights]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_going_on_from_any_step_of_any_stage_equals_never_stopping(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    whole = every_kind_of_stage(dtype)
    saver, losses = Saver(tmp_path, WORLD), []
    for _ in range(TOTAL):
        whole.save(saver, {}, blocking=True)
        losses += run(whole, 1)
    for at in range(0, TOTAL, 1 if dtype == torch.float32 else 4):
        again = every_kind_of_stage(dtype, seed=9)
        again.resume(tmp_path / f"iter_{at:08d}")
        assert run(again, TOTAL - at) == losses[at:], at
        assert again.tokens == whole.tokens
        assert again.positions == whole.positions
        for found, expected in zip(everything(again), everything(whole), strict=True):
            assert torch.equal(found, expected), at
    with pytest.raises(ValueError, match="all 21 steps of the stages are done"):
        whole.step()


BETWEEN: dict[str, dict[str, Any]] = {
    "single": {"names": "b", "combine": "single"},
    "alternate": {"names": "bc", "combine": "alternate"},
    "average": {"names": "bc"},
    "gradients": {"names": "bc", "of_gradients": True},
}


@pytest.mark.parametrize("kind", BETWEEN)
@pytest.mark.parametrize("stop", [None, 3, 4, 5])
def test_what_goes_on_over_a_stage_between_is_as_if_that_had_not_been(
    tmp_path: Path, kind: str, stop: int | None
) -> None:
    """Moments, data and learning rate; the stage between has a rate of 0 and moves nothing."""
    still = UpdateSettings(weight_decay=0.0)

    def made(seed: int = 1) -> Trainer:
        between = {**BETWEEN[kind]}
        a = objective("a")
        stages = [
            stage_of([a], steps=3, combine="single"),
            stage_of(
                between.pop("names"),
                steps=2,
                adams=dict.fromkeys("bc", still),
                rates=dict.fromkeys("bc", lambda step: 0.0),
                **between,
            ),
            stage_of([a], steps=3, combine="single", inherit="a"),
        ]
        return Trainer(small_model(seed), stages)

    through = made()
    if stop is not None:
        run(through, stop)
        through.save(Saver(tmp_path, WORLD), {}, blocking=True)
        through = made(seed=9)
        through.resume(tmp_path / f"iter_{stop:08d}")
    run(through, 8 - (stop or 0))
    plain = Trainer(small_model(), [stage_of("a", combine="single")])
    run(plain, 6)
    assert through.positions["a"] == 6
    assert through.last_rates == plain.last_rates
    for found, expected in zip(everything(through), everything(plain), strict=True):
        assert torch.equal(found, expected)


def test_an_objective_that_does_not_go_on_begins_anew() -> None:
    a, b = objective("a"), objective("b")
    trainer = Trainer(
        small_model(),
        [
            stage_of([a], steps=2, combine="single"),
            stage_of([b], steps=1, combine="single"),
            stage_of([a], steps=1, combine="single"),
        ],
    )
    run(trainer, 3)
    assert trainer.optimizer.owners == ["b"]  # nobody needs the moments of a
    run(trainer, 1)
    assert trainer.optimizer.steps.tolist() == [1]
    assert trainer.positions == {"a": 1, "b": 1}
    assert a.state() == stage_of([objective("a")]).members["a"].objective.state() | {
        "consumed_sequences": 4
    }
    assert trainer.tokens["a"] == 3 * 4 * 8


def test_moments_wait_only_for_the_next_stage_that_has_their_objective() -> None:
    """b begins anew before it goes on: a parent need not have its moments."""
    a, b = objective("a"), objective("b")
    stages = [
        stage_of([a], steps=1, combine="single"),
        stage_of([b], steps=1, combine="single"),
        stage_of([a, b], steps=1, inherit="b"),
    ]
    trainer = Trainer(small_model(), stages)
    assert trainer.optimizer.owners == ["a"]
    run(trainer, 1)
    assert trainer.optimizer.owners == ["a"]
    run(trainer, 2)
    assert trainer.optimizer.steps.tolist() == [1, 2]


def test_an_excursion_goes_on_with_what_it_is_told_and_with_nothing_else(tmp_path: Path) -> None:
    parent = Trainer(small_model(), [stage_of("ab")])
    run(parent, 3)
    parent.save(Saver(tmp_path, WORLD), {}, blocking=True)
    a, b, c = (objective(name) for name in "abc")
    stages = [
        stage_of([b, c], steps=2, inherit="b"),
        stage_of([a], steps=2, combine="single", inherit="a"),
    ]
    child = Trainer(small_model(seed=9), stages)
    child.start_from(tmp_path / "iter_00000003")
    assert dict(zip(child.optimizer.owners, child.optimizer.steps.tolist(), strict=True)) == {
        "b": 3,
        "c": 0,
        "a": 3,
    }
    for name in "ab":
        assert torch.equal(
            child.optimizer.kept.shards[name]["exp_avg"],
            parent.optimizer.kept.shards[name]["exp_avg"],
        )
    assert not child.optimizer.kept.shards["c"]["exp_avg"].any()
    assert child.positions == {"a": 3, "b": 3, "c": 0}
    assert a.state()["consumed_sequences"] == b.state()["consumed_sequences"] == 12
    assert c.state()["consumed_sequences"] == 0
    assert child.steps_done == 0
    for name, weight in parameters_of(parent.model).items():
        assert torch.equal(parameters_of(child.model)[name], weight)
    run(child, 4)
    assert child.optimizer.steps.tolist() == [5]


def test_moments_that_a_parent_does_not_have_are_named(tmp_path: Path) -> None:
    parent = Trainer(small_model(), [stage_of("ab")])
    parent.save(Saver(tmp_path, WORLD), {}, blocking=True)
    child = Trainer(small_model(), [stage_of("c", combine="single", inherit="c")])
    with pytest.raises(
        CheckpointError, match="no moments of c to go on with; it has those of a, b"
    ):
        child.start_from(tmp_path / "iter_00000000")


class Keeper(Objective):
    """Keeps the weights that a stage began with, as a reference policy."""

    def __init__(self, name: str) -> None:
        self.name, self.inner = name, objective(name)
        self.kept: Tensor | None = None

    def begin(self, weights: Tensor, inherit: bool) -> Tensor | None:
        if self.kept is None or not inherit:
            self.kept = weights.clone()
        return self.kept

    def next_batch(self) -> Any:
        return self.inner.next_batch()

    def loss(self, head: Head, inputs: LossInputs, normalizer: Tensor) -> TokenLoss:
        return self.inner.loss(head, inputs, normalizer)

    def state(self) -> dict[str, Any]:
        return self.inner.state()

    def load_state(self, state: Any) -> None:
        self.inner.load_state(state)


@pytest.mark.parametrize("inherit", [True, False])
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_a_reference_is_kept_over_a_stage_between_if_its_objective_goes_on(
    tmp_path: Path, inherit: bool, stop: int
) -> None:
    def made(seed: int) -> tuple[Trainer, Keeper]:
        keeper: Any = Keeper("a")
        stages = [
            stage_of([keeper], steps=2, combine="single"),
            stage_of("b", steps=2, combine="single"),
            stage_of([keeper], steps=2, combine="single", inherit="a" if inherit else ""),
        ]
        return Trainer(small_model(seed), stages), keeper

    first, _ = made(1)
    start = first.model.data_parallel.weights.clone()
    run(first, stop)
    first.save(Saver(tmp_path, WORLD), {}, blocking=True)
    second, keeper = made(9)
    second.resume(tmp_path / f"iter_{stop:08d}")
    for trainer in (first, second):
        run(trainer, 6 - stop)
    assert keeper.kept is not None
    assert torch.equal(keeper.kept, start) == inherit
    for found, expected in zip(everything(second), everything(first), strict=True):
        assert torch.equal(found, expected)


def test_objectives_of_one_name_must_be_one_objective() -> None:
    with pytest.raises(ValueError, match="two objectives have the name 'a'"):
        Trainer(small_model(), [stage_of("a", steps=1), stage_of("a")])
    with pytest.raises(ValueError, match="objectives need different names; given: a, a"):
        stage_of("aa")


def test_one_adam_for_different_settings_is_refused() -> None:
    with pytest.raises(ValueError, match="one state cannot have the settings"):
        Trainer(small_model(), [stage_of("ab", of_gradients=True)])


def test_turns_are_taken_in_order_for_ever() -> None:
    stage: TrainingStage = stage_of("abc", combine="alternate", turns={"a": 2, "c": 3})
    order = "".join("".join(stage.times.trained_at(step)) for step in range(13))
    assert order == "aabcccaabccca"


def test_a_step_that_reads_a_rate_of_its_own_course() -> None:
    trainer = Trainer(small_model(), [stage_of("ab", combine="alternate")])
    rates = []
    for _ in range(4):
        trainer.step()
        rates.append(trainer.last_rates)
    expected = [{"a": 1e-2}, {"b": 3e-3}, {"a": 5e-3}, {"b": 6e-3}]
    for found, wanted in zip(rates, expected, strict=True):
        assert found == pytest.approx(wanted)
    assert not math.isnan(sum(sum(rate.values()) for rate in rates))
