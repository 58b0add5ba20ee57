"""Combinations of updates in one process, against what they mean written out, in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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

from megarlx import plug
from megarlx.config.stages import StageConfig
from megarlx.ops.averaging import average_adamw_
from megarlx.training.combine import projection, sign_agreement, weighted_sum
from megarlx.training.shares import Course, Shares
from megarlx.training.stages import TrainingStage
from megarlx.training.trainer import Trainer

SHARES = {"a": 0.5, "b": 0.3, "c": 0.2}


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum()


def projected(deltas: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Word by word: one update after the other, one conflict after the other."""
    total = torch.zeros_like(deltas[0])
    for i, share in enumerate(shares):
        left = deltas[i].clone()
        for j, other in enumerate(deltas):
            if j != i and (product := dot(left, other)) < 0:
                left -= product / dot(other, other) * other
        total += share * left
    return total


def agreeing(deltas: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    weighted = [share * delta for share, delta in zip(shares, deltas, strict=True)]
    found = []
    for column in torch.stack(weighted, 1):
        sign = column.sum().sign()
        found.append(column[column.sign() == sign].sum())
    return torch.stack(found)


BOOK = {"projection": (projection, projected), "sign_agreement": (sign_agreement, agreeing)}


@pytest.mark.parametrize("name", BOOK)
@pytest.mark.parametrize("n", [2, 3, 5])
def test_a_combination_is_what_it_says(name: str, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    combine, written = BOOK[name]
    conflicts = 0
    for size in (3, 8, 40):
        deltas = [torch.randn(size, dtype=torch.float64, generator=generator) for _ in range(n)]
        shares = torch.rand(n, dtype=torch.float64, generator=generator).tolist()
        before = [delta.clone() for delta in deltas]
        found = combine(deltas, shares, dot)
        torch.testing.assert_close(found, written(deltas, shares), rtol=1e-10, atol=1e-12)
        assert all(torch.equal(a, b) for a, b in zip(deltas, before, strict=True))
        conflicts += not torch.allclose(found, weighted_sum(deltas, shares, dot))
    assert conflicts


@pytest.mark.parametrize("combine", [projection, sign_agreement])
def test_what_agrees_is_summed_and_an_update_of_zero_takes_nothing_away(combine: Any) -> None:
    one, two = torch.rand(2, 9, dtype=torch.float64)
    none = torch.zeros_like(one)
    shares = [0.5, 0.3, 0.2]
    found = combine([one, two, none], shares, dot)
    torch.testing.assert_close(found, 0.5 * one + 0.3 * two)
    assert not combine([none, none], [0.5, 0.5], dot).any()


def flat(update: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([one.reshape(-1) for one in update.values()])


def against(step: int) -> float:
    """Of the losses, so that updates of these objectives are in conflict."""
    return -1.0 if step % 2 else 1.0


Written = Callable[[Sequence[Tensor], Sequence[float]], Tensor]


def by_the_book(
    names: str, steps: int, every: int, written: Written, scales: dict[str, Any]
) -> dict[str, Tensor]:
    book = Textbook({name: ADAMS[name] for name in names})
    made = {name: objective(name, scale=scales.get(name)) for name in names}
    common = book.weights
    own = dict.fromkeys(names, common)
    for step in range(steps):
        moved = set()
        for name in names:
            book.weights = own[name]
            gradients = book.gradients(made[name])
            if all(g.isfinite().all() for g in gradients.values()):
                book.add(book.update(name, gradients, RATES[name](step)))
                moved.add(name)
            own[name] = book.weights
        if (step + 1) % every == 0:
            left = [name for name in names if every > 1 or name in moved]
            ways = [flat({n: own[name][n] - w for n, w in common.items()}) for name in left]
            shares = [SHARES[name] for name in left]
            total = shares[0] * ways[0] if len(left) == 1 else written(ways, shares)
            parts = total.split([w.numel() for w in common.values()])
            common = {
                n: w + part.view(w.shape)
                for (n, w), part in zip(common.items(), parts, strict=True)
            }
            own = dict.fromkeys(names, common)
    return common


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", BOOK)
@pytest.mark.parametrize("names", ["ab", "abc"])
def test_a_stage_applies_its_combination(names: str, name: str, every: int) -> None:
    """One step of b is not finite: it is left out of that step, and the others keep their shares;
    of two objectives one is left, whose share of its update is applied."""
    scales: dict[str, Any] = {"a": against, "b": lambda step: math.nan if step == 1 else 1.0}
    combine, written = BOOK[name]
    courses = {one: Course(SHARES[one], SHARES[one]) for one in names}
    base = stage_of([objective(one, scale=scales.get(one)) for one in names])
    stage = TrainingStage(
        list(base.members.values()), shares=Fixed(courses), combination=combine, sync_every=every
    )
    trainer = Trainer(small_model(), [stage])
    for _ in range(6):
        trainer.step()
    assert_same_weights(trainer.model, by_the_book(names, 6, every, written, scales))


class Fixed(Shares):
    """Shares as they are, which need not sum to one."""

    def at(self, step: int) -> dict[str, float]:
        return {name: course.first for name, course in self.courses.items()}


def test_gradients_are_combined_before_the_rule_and_one_not_finite_skips_the_step() -> None:
    same, rates = dict.fromkeys("ab", ADAMS["a"]), dict.fromkeys("ab", RATES["a"])
    scales: dict[str, Any] = {"a": against, "b": lambda step: math.inf if step == 2 else 1.0}
    base = stage_of(
        [objective(one, scale=scales[one]) for one in "ab"],
        adams=same,
        rates=rates,
        of_gradients=True,
    )
    stage = TrainingStage(list(base.members.values()), shared_moments=True, combination=projection)
    trainer = Trainer(small_model(), [stage])
    book = Textbook({"one": ADAMS["a"]})
    made = {one: objective(one, scale=scales[one]) for one in "ab"}
    for step in range(4):
        trainer.step()
        found = [book.gradients(made[one]) for one in "ab"]
        if step == 2:
            continue
        total = projected([flat(one) for one in found], [0.5, 0.5])
        parts = total.split([w.numel() for w in book.weights.values()])
        mixed = {
            n: part.view(w.shape) for (n, w), part in zip(book.weights.items(), parts, strict=True)
        }
        book.add(book.update("one", mixed, RATES["a"](step)))
    assert trainer.optimizer.steps.tolist() == [3]
    assert_same_weights(trainer.model, book.weights)


def test_a_sum_that_is_not_marked_linear_gives_what_the_marked_one_gives() -> None:
    def plain(deltas: Any, shares: Any, dot: Any) -> Tensor:
        return sum(share * delta for share, delta in zip(shares, deltas, strict=True))  # type: ignore[return-value]

    found = []
    for combine in (plain, weighted_sum):
        base = stage_of("abc")
        stage = TrainingStage(list(base.members.values()), combination=combine)
        trainer = Trainer(small_model(), [stage])
        for _ in range(4):
            trainer.step()
        found.append(trainer)
    assert_same_weights(found[0].model, parameters_of(found[1].model))


def test_a_combination_of_another_shape_is_refused() -> None:
    base = stage_of("ab")
    stage = TrainingStage(
        list(base.members.values()), combination=lambda deltas, shares, dot: deltas[0][:1]
    )
    with pytest.raises(ValueError, match=r"the combination gave \[1\] torch.float64 of deltas of"):
        Trainer(small_model(), [stage]).step()


def test_a_configuration_names_a_combination_for_averages() -> None:
    two = {"sft": {}, "rl": {}}
    stage = {"steps": 2, "combine": "average", "objectives": two, "combination": "projection"}
    assert StageConfig.model_validate(stage).combination == "projection"
    assert StageConfig.model_validate({**stage, "combination": "mine:sum"}).combination
    with pytest.raises(ValidationError, match=r"'product'.*weighted_sum.*projection"):
        StageConfig.model_validate({**stage, "combination": "product"})
    with pytest.raises(ValidationError, match="combination: is for combine = 'average' only"):
        StageConfig.model_validate({**stage, "combine": "alternate"})
    members = list(stage_of("ab").members.values())
    with pytest.raises(ValueError, match="its combination is not weighted_sum"):
        TrainingStage(members, combine="alternate", combination=projection)
    assert plug.resolve("combination", "weighted_sum") is weighted_sum


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("names", ["a", "ab", "abc"])
def test_averaging_keeps_its_bits(names: str, every: int) -> None:
    """AdamW and the weighted sum are the fused op, called for each part that decays alike, and an
    average of local steps adds each way by itself."""
    courses = Shares({name: Course(SHARES[name], 1.0) for name in names}, 7)
    base = stage_of(names)
    members = list(base.members.values())
    stage = TrainingStage(members, steps=7, shares=courses, sync_every=every)
    trainer = Trainer(small_model(), [stage])
    optimizer = trainer.optimizer
    border = trainer.model.data_parallel.layout.decayed_shard_size
    common = optimizer.master.clone()
    own = {name: common.clone() for name in names}
    state = {name: [torch.zeros_like(common) for _ in range(2)] for name in names}
    counts = torch.zeros(len(names), dtype=torch.int64)

    def op(master: Tensor, some: str, shares: dict[str, float], step: int) -> None:
        given = [optimizer.gradient_shard(name) for name in some]
        norms = optimizer.sums.norms(given)
        limits = [ADAMS[name].clip_norm or math.inf for name in some]
        clips = (torch.tensor(limits, dtype=torch.float64) / norms).clamp(max=1.0)
        place = [names.index(name) for name in some]
        for part, decayed in ((slice(0, border), True), (slice(border, None), False)):
            steps = counts[place].clone()
            average_adamw_(
                master[part],
                [gradient[part] for gradient in given],
                [state[name][0][part] for name in some],
                [state[name][1][part] for name in some],
                lrs=[RATES[name](step) for name in some],
                betas=[ADAMS[name].betas for name in some],
                eps=[ADAMS[name].eps for name in some],
                weight_decays=[ADAMS[name].weight_decay if decayed else 0.0 for name in some],
                steps=steps,
                clips=clips,
                weights=[shares[name] for name in some],
            )
        counts[place] = steps

    for step in range(7):
        trainer.step()
        shares = courses.at(step)
        if every == 1:
            op(common, names, shares, step)
        else:
            for name in names:
                op(own[name], name, {name: 1.0}, step)
            if (step + 1) % every == 0 or step == 6:
                ways = [own[name].sub_(common) for name in names]
                for name, way in zip(names, ways, strict=True):
                    common.add_(way, alpha=shares[name])
                own = {name: common.clone() for name in names}
        assert torch.equal(optimizer.master, common), step
    for name in names:
        kept = optimizer.kept.shards[name]
        assert torch.equal(kept["exp_avg"], state[name][0])
        assert torch.equal(kept["exp_avg_sq"], state[name][1])
