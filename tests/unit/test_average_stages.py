"""Averaged, alternating and mixed objectives against torch.optim.AdamW, in fp64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
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

from megarlx.training import optimizer
from megarlx.training.parts import UpdateSettings
from megarlx.training.shares import Adaptation, Course, Shares
from megarlx.training.trainer import Trainer

PLAIN = UpdateSettings(weight_decay=0.0, clip_norm=None)


def trained(steps: int, *names: Any, **stage: Any) -> Trainer:
    trainer = Trainer(small_model(), [stage_of(names, **stage)])
    for _ in range(steps):
        trainer.step()
    return trainer


def moved(trainer: Trainer) -> dict[str, Tensor]:
    start = parameters_of(small_model())
    return {n: w - start[n] for n, w in parameters_of(trainer.model).items()}


@pytest.mark.parametrize("names", ["ab", "abc"])
@pytest.mark.parametrize("weights", [None, (1.0, 3.0, 2.0)])
def test_average_is_the_weighted_sum_of_each_objectives_own_adamw_update(
    names: str, weights: tuple[float, ...] | None
) -> None:
    shares = {name: 1 / len(names) for name in names}
    given = None
    if weights is not None:
        used = weights[: len(names)]
        shares = {name: w / sum(used) for name, w in zip(names, used, strict=True)}
        given = Shares({name: Course(w, w) for name, w in zip(names, used, strict=True)})
    trainer = trained(5, *names, shares=given)
    book = Textbook({name: ADAMS[name] for name in names})
    made = {name: objective(name) for name in names}
    for step in range(5):
        gradients = {name: book.gradients(made[name]) for name in names}
        updates = {n: book.update(n, gradients[n], RATES[n](step)) for n in names}
        for name in names:
            book.add(updates[name], shares[name])
    assert_same_weights(trainer.model, book.weights)


@pytest.mark.parametrize("names", ["a", "ab", "abc"])
def test_each_objective_decays_the_embedding_or_not(names: str) -> None:
    without = {n: replace(ADAMS[n], decay_embeddings=n == "b") for n in names}
    combine = "single" if names == "a" else "average"
    trainer, plain = (trained(4, *names, adams=a, combine=combine) for a in (without, ADAMS))
    book = Textbook(without)
    made = {name: objective(name) for name in names}
    for step in range(4):
        gradients = {name: book.gradients(made[name]) for name in names}
        updates = {n: book.update(n, gradients[n], RATES[n](step)) for n in names}
        for name in names:
            book.add(updates[name], 1 / len(names))
    assert_same_weights(trainer.model, book.weights)
    one, other = (parameters_of(t.model)["embedding.weight"] for t in (trainer, plain))
    assert (one - other).norm() / other.norm() > 1e-4


def test_average_of_gradients_is_one_adamw_on_the_mixed_loss() -> None:
    same = dict.fromkeys("abc", ADAMS["a"])
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    courses = Shares({name: Course(share, share) for name, share in shares.items()})
    rates = dict.fromkeys("abc", RATES["a"])
    trainer = trained(5, *"abc", adams=same, rates=rates, of_gradients=True, shares=courses)
    book = Textbook({"one": ADAMS["a"]})
    made = {name: objective(name) for name in shares}
    for step in range(5):
        found = {name: book.gradients(made[name]) for name in shares}
        mixed = {n: sum(s * found[k][n] for k, s in shares.items()) for n in book.weights}
        book.add(book.update("one", mixed, RATES["a"](step)))  # type: ignore[arg-type]
    assert_same_weights(trainer.model, book.weights)


@pytest.mark.parametrize("turns", [{"a": 1, "b": 1}, {"a": 2, "b": 1}, {"a": 1, "b": 3}])
def test_alternating_is_each_objectives_own_adamw_in_its_turns(turns: dict[str, int]) -> None:
    trainer = trained(7, "a", "b", combine="alternate", turns=turns)
    book = Textbook({name: ADAMS[name] for name in turns})
    made, taken = {name: objective(name) for name in turns}, dict.fromkeys(turns, 0)
    order = [name for name, count in turns.items() for _ in range(count)]
    for step in range(7):
        name = order[step % len(order)]
        book.add(book.update(name, book.gradients(made[name]), RATES[name](taken[name])))
        taken[name] += 1
    assert_same_weights(trainer.model, book.weights)
    assert trainer.positions == taken
    assert dict(zip(trainer.optimizer.owners, trainer.optimizer.steps.tolist(), strict=True)) == (
        taken
    )


# What follows from averaging updates and not losses.


def test_equal_gradients_and_states_make_exactly_one_adam_step() -> None:
    adams, rates = dict.fromkeys("ab", ADAMS["a"]), dict.fromkeys("ab", RATES["a"])
    both = trained(
        4, objective("a", data="same"), objective("b", data="same"), adams=adams, rates=rates
    )
    alone = trained(4, objective("a", data="same"), adams=adams, rates=rates)
    for name, weight in parameters_of(alone.model).items():
        torch.testing.assert_close(
            parameters_of(both.model)[name], weight, rtol=1e-12, atol=1e-14, msg=name
        )


def test_an_objective_without_gradient_or_decay_halves_the_others_step() -> None:
    adams = dict.fromkeys("ab", PLAIN)
    half = moved(trained(1, "a", objective("b", scale=lambda step: 0.0), adams=adams))
    whole = moved(trained(1, "a", adams=adams))
    for name, update in whole.items():
        torch.testing.assert_close(half[name], update / 2, rtol=1e-11, atol=1e-16)
        assert update.abs().max() > 1e-3


def test_scaling_one_loss_changes_almost_nothing() -> None:
    adams = dict.fromkeys("ab", PLAIN)
    once = moved(trained(3, "a", "b", adams=adams))
    scaled = moved(trained(3, "a", objective("b", scale=lambda step: 1000.0), adams=adams))
    one_adam = [
        moved(trained(3, "a", b, adams=adams, rates=dict.fromkeys("ab", RATES["a"]),
                      of_gradients=True))
        for b in (objective("b"), objective("b", scale=lambda step: 1000.0))
    ]  # fmt: skip

    def difference(x: dict[str, Tensor], y: dict[str, Tensor]) -> float:
        squares = sum(float((x[n] - y[n]).square().sum()) for n in x)
        return math.sqrt(squares / sum(float(y[n].square().sum()) for n in y))

    assert difference(scaled, once) < 1e-3  # eps stands beside larger roots
    assert difference(*one_adam) > 0.3


def test_average_of_updates_is_not_one_adam_on_half_of_each_loss() -> None:
    adams, rates = dict.fromkeys("ab", PLAIN), dict.fromkeys("ab", RATES["a"])
    updates = moved(trained(1, "a", "b", adams=adams, rates=rates))
    gradients = moved(trained(1, "a", "b", adams=adams, rates=rates, of_gradients=True))
    name = next(n for n in updates if n.endswith("attention.o.weight"))
    assert (updates[name] - gradients[name]).norm() > 0.1 * gradients[name].norm()


# Weights.


def test_scheduled_shares_go_straight_from_first_to_last_and_sum_to_one() -> None:
    shares = Shares({"a": Course(1.0, 0.0), "b": Course(1.0, 3.0)}, steps=5)
    trainer = Trainer(small_model(), [stage_of("ab", steps=5, shares=shares)])
    for step in range(5):
        trainer.step()
        a, b = 1 - step / 4, 1 + 2 * step / 4
        assert trainer.last_shares == pytest.approx({"a": a / (a + b), "b": b / (a + b)})
    assert trainer.last_shares == {"a": 0.0, "b": 1.0}


def test_adaptive_shares_follow_the_losses_as_the_rule_says() -> None:
    rate, sharpness, least = 0.3, 2.0, 0.2
    weights = {"a": 1.0, "b": 2.0, "c": 0.5}
    shares = Shares(
        {n: Course(w, w) for n, w in weights.items()}, None, Adaptation(rate, sharpness, least)
    )
    rates = {"a": lambda step: 0.05, "b": lambda step: 1e-4, "c": lambda step: 1e-3}
    trainer = Trainer(small_model(), [stage_of("abc", shares=shares, rates=rates)])
    means: dict[str, float] = {}
    first: dict[str, float] = {}
    seen = []
    for _ in range(8):
        losses = trainer.global_loss(trainer.step()[0])
        raw = {n: w * means.get(n, 1.0) ** sharpness for n, w in weights.items()}
        expected = {n: r / sum(raw.values()) for n, r in raw.items()}
        low = {n for n, share in expected.items() if share < least}
        left = sum(raw[n] for n in raw if n not in low)
        expected = {n: least if n in low else raw[n] / left * (1 - least * len(low)) for n in raw}
        assert trainer.last_shares == pytest.approx(expected, rel=1e-12)
        seen.append(tuple(expected.values()))
        for name, loss in losses.items():
            signal = min(max(loss / first.setdefault(name, loss), 0.0), 1.0)
            means[name] = means.get(name, signal) * (1 - rate) + rate * signal
    assert len(set(seen)) > 5


@pytest.mark.parametrize("signals", [(0.0, 0.0), (1.0, 0.0), (1e-9, 1.0), (5.0, -3.0)])
@pytest.mark.parametrize("least", [0.0, 0.1, 0.49])
def test_adaptive_shares_sum_to_one_and_keep_the_least(
    signals: tuple[float, float], least: float
) -> None:
    shares = Shares({"a": Course(), "b": Course()}, None, Adaptation(1.0, 3.0, least))
    shares.observe(dict(zip("ab", signals, strict=True)))
    found = shares.at(3)
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-12)
    assert min(found.values()) >= least - 1e-12


def test_a_least_share_that_cannot_be_given_to_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"least is 0.4; 3 objectives allow at most 0.3333"):
        Shares({n: Course() for n in "abc"}, None, Adaptation(0.1, 1.0, 0.4))


# Gradients that are not finite.


def test_an_objective_that_is_not_finite_is_left_out_and_the_others_go_on() -> None:
    def broken(step: int) -> float:
        return math.inf if step == 1 else 1.0

    trainer = Trainer(small_model(), [stage_of(["a", objective("b", scale=broken)])])  # type: ignore[list-item]
    book = Textbook({name: ADAMS[name] for name in "ab"})
    made = {"a": objective("a"), "b": objective("b")}
    for step in range(4):
        _, report = trainer.step()
        assert {n: bool(flag) for n, flag in report.found_inf.items()} == {
            "a": False,
            "b": step == 1,
        }
        updates = {}
        gradients = {n: book.gradients(made[n]) for n in "ab"}
        for name in "ab" if step != 1 else "a":
            updates[name] = book.update(name, gradients[name], RATES[name](step))
        for update in updates.values():
            book.add(update, 0.5)
    assert_same_weights(trainer.model, book.weights)
    assert trainer.optimizer.steps.tolist() == [4, 3]


def test_what_is_mixed_with_something_not_finite_is_not_applied() -> None:
    same, rates = dict.fromkeys("ab", ADAMS["a"]), dict.fromkeys("ab", RATES["a"])
    broken = objective("b", scale=lambda step: math.nan)
    trainer = trained(2, "a", broken, adams=same, rates=rates, of_gradients=True)
    assert_same_weights(trainer.model, parameters_of(small_model()))
    assert trainer.optimizer.steps.tolist() == [0]


@pytest.mark.parametrize("kind", ["average", "gradients", "alternate"])
def test_micro_batches_change_nothing_but_rounding(kind: str) -> None:
    weights = []
    for microbatches in (1, 2, 4):
        options: dict[str, Any] = {"combine": "alternate" if kind == "alternate" else "average"}
        if kind == "gradients":
            options |= {
                "of_gradients": True,
                "adams": dict.fromkeys("ab", ADAMS["a"]),
                "rates": dict.fromkeys("ab", RATES["a"]),
            }
        made = [objective(name, microbatches=microbatches) for name in "ab"]
        weights.append(parameters_of(trained(5, *made, **options).model))
    for other in weights[1:]:
        for name, weight in weights[0].items():
            torch.testing.assert_close(other[name], weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rates_are_not_rounded(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates, decays, shares and clips reach the op as they are, whatever the weights' type."""
    given: list[dict[str, Any]] = []
    whole = optimizer.average_adamw_

    def watched(*arguments: Any, **options: Any) -> None:
        given.append(options)
        whole(*arguments, **options)

    monkeypatch.setattr(optimizer, "average_adamw_", watched)
    rates = {"a": lambda step: 1e-3 / 3, "b": lambda step: 1e-2 / 7}
    adams = {
        "a": UpdateSettings(weight_decay=0.1, clip_norm=1e-2 / 3),
        "b": UpdateSettings(weight_decay=0.2 / 3, clip_norm=1e-2 / 7),
    }
    shares = Shares({"a": Course(1 / 3, 1 / 3), "b": Course(2 / 3, 2 / 3)})
    stage = stage_of(["a", "b"], rates=rates, adams=adams, shares=shares)
    _, report = Trainer(small_model(dtype=dtype), [stage]).step()
    assert given
    decays = [options["weight_decays"].tolist() for options in given]
    assert [0.1, 0.2 / 3] in decays
    for options in given:
        assert options["lrs"].tolist() == [1e-3 / 3, 1e-2 / 7]
        assert options["weights"].tolist() == [1 / 3, 2 / 3]
        norms = [report.gradient_norms[name].double() for name in ("a", "b")]
        clips = [
            limit / float(norm) for limit, norm in zip((1e-2 / 3, 1e-2 / 7), norms, strict=True)
        ]
        assert max(clips) < 1
        assert options["clips"].tolist() == clips
