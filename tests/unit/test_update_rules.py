"""Update rules in one process: what a skipped step leaves alone, and what does not go together."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_cases import ADAMS, RATES, objective, parameters_of, small_model, stage_of
from torch import Tensor

from megarlx import plug
from megarlx.checkpoint import CheckpointError, Saver
from megarlx.comm.groups import Group
from megarlx.config.optimizer import OptimizerConfig
from megarlx.config.stages import StageConfig
from megarlx.training.muon import Muon
from megarlx.training.parts import Range, UpdateSettings, with_wholes
from megarlx.training.trainer import Trainer
from megarlx.training.update_rules import rule_of

WORLD = Group.alone("world")


class Lion:
    """The sign of a mean of gradients: a rule of somebody else."""

    state = ("mean",)

    def __init__(self, settings: UpdateSettings, keep: float = 0.9) -> None:
        self.keep = keep

    def whole(self, name: str, shape: tuple[int, ...]) -> bool:
        return False

    def delta(
        self,
        parts: Any,
        gradient: Tensor,
        state: Any,
        lr: Tensor,
        steps: Tensor,
        clip: Tensor,
        found_inf: Tensor,
    ) -> Tensor:
        mean, rate = state["mean"], lr.to(gradient.dtype)
        moved = self.keep * mean + (1 - self.keep) * gradient
        mean.copy_(torch.where(found_inf, mean, moved))
        delta = parts.room()
        for part, decay, _ in parts.ranges:
            delta[part] = -rate * (moved[part].sign() + decay * parts.master[part])
        return torch.where(found_inf, 0.0, delta)


RULES = [*plug.ours("update rule"), f"{__name__}:Lion"]


def by(rule: str, name: str = "a", **options: Any) -> dict[str, UpdateSettings]:
    return {name: replace(ADAMS[name], rule=rule, rule_options=options)}


def run(trainer: Trainer, steps: int) -> list[float]:
    return [loss for _ in range(steps) for loss in trainer.global_loss(trainer.step()[0]).values()]


def held(trainer: Trainer) -> list[Tensor]:
    optimizer = trainer.optimizer
    return [t.clone() for t in (*optimizer.shards.shards.values(), optimizer.steps)]


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("among", ["alone", "beside AdamW", "with local steps"])
def test_a_skipped_step_changes_nothing(rule: str, among: str, value: float) -> None:
    """Neither at first, where the state is 0, nor later."""
    broken = objective("a", scale=lambda step: value if step in (0, 2) else 1.0)
    names: list[Any] = [broken] if among == "alone" else [broken, objective("b")]
    adams = {**ADAMS, **by(rule)}
    combine = "single" if among == "alone" else "average"
    stage = stage_of(names, adams=adams, combine=combine)
    if among == "with local steps":
        stage = type(stage)(list(stage.members.values()), sync_every=5)
    trainer = Trainer(small_model(), [stage])
    shards = trainer.optimizer.kept.shards["a"]
    for step in range(4):
        before = {name: shard.clone() for name, shard in shards.items()}
        weights = trainer.optimizer.masters.of("a").clone()
        count = trainer.optimizer.kept.steps_of("a").clone()
        trainer.step()
        skipped = step in (0, 2)
        assert trainer.optimizer.kept.steps_of("a") == count + (not skipped)
        for name, shard in shards.items():
            assert torch.equal(shard, before[name]) == skipped, name
        if among != "beside AdamW":
            assert torch.equal(trainer.optimizer.masters.of("a"), weights) == skipped
    assert all(w.isfinite().all() for w in parameters_of(trainer.model).values())


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_learns_and_resumes_exactly(rule: str, tmp_path: Path) -> None:
    def made(seed: int) -> Trainer:
        same = objective("a", data="a")
        same.loader.dataset.sample = lambda index, one=same.loader.dataset: type(one).sample(one, 0)  # type: ignore[attr-defined]
        adams = by(rule) if rule != f"{__name__}:Lion" else by(rule, keep=0.5)
        rates = {"a": lambda step: 3e-3}
        return Trainer(small_model(seed), [stage_of([same], adams=adams, rates=rates)])

    whole = made(1)
    losses = run(whole, 20)
    assert losses[-1] < 0.9 * losses[0]
    whole.save(Saver(tmp_path, WORLD), {}, blocking=True)
    expected = run(whole, 3)
    again = made(9)
    again.resume(tmp_path / "iter_00000020")
    assert run(again, 3) == expected
    for found, wanted in zip(held(again), held(whole), strict=True):
        assert torch.equal(found, wanted)


def test_muon_moves_every_direction_of_a_matrix_alike() -> None:
    """Its rows and columns stay near those of U Vᵀ; its root mean square is AdamW's, about."""
    rule = Muon(UpdateSettings())
    generator = torch.Generator().manual_seed(1)
    for shape in ((12, 30), (30, 12), (12, 12)):
        matrix = torch.randn(shape, dtype=torch.float64, generator=generator)
        found = rule.direction(matrix)
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        singular = torch.linalg.svdvals(found) / (0.2 * max(shape) ** 0.5)
        assert 0.6 < singular.min() < singular.max() < 1.3
        inside = u.T @ found @ v.T
        assert (inside - inside.diag().diag()).norm() < 1e-6 * inside.norm()
        torch.testing.assert_close(rule.direction(100 * matrix), found, rtol=1e-9, atol=1e-12)
        assert 0.1 < found.square().mean().sqrt() < 0.3


def test_muon_is_adamw_where_nothing_is_a_matrix_of_a_layer() -> None:
    muon = Trainer(small_model(), [stage_of("a", adams=by("muon"), combine="single")])
    adamw = Trainer(small_model(), [stage_of("a", combine="single")])
    run(muon, 1), run(adamw, 1)
    rule = Muon(UpdateSettings())
    found, expected = parameters_of(muon.model), parameters_of(adamw.model)
    layouts = muon.model.data_parallel.layouts
    assert any(rule.whole(p.name, p.global_shape) for one in layouts.values() for p in one.pieces)
    for name, layout in layouts.items():
        matrix = any(rule.whole(piece.name, piece.global_shape) for piece in layout.pieces)
        assert torch.allclose(found[name], expected[name], rtol=1e-12, atol=0) != matrix, name


def test_ranges_are_cut_where_tensors_are_whole_and_still_are_the_shard() -> None:
    ranges = [Range(slice(0, 10), 0.1), Range(slice(10, 20), 0.0)]
    found = with_wholes(ranges, [(2, 4), (4, 6), (8, 12)])
    assert [(r.part.start, r.part.stop, r.weight_decay, r.whole) for r in found] == [
        (0, 2, 0.1, False),
        (2, 6, 0.1, True),
        (6, 8, 0.1, False),
        (8, 10, 0.1, True),
        (10, 12, 0.0, True),
        (12, 20, 0.0, False),
    ]


# What does not go together.


def test_rules_do_not_mix(tmp_path: Path) -> None:
    """State goes on by the rule that made it: from stage to stage, run to run, in one checkpoint;
    and objectives with one state have one rule."""
    a, b = objective("a"), objective("b")
    muon = {**ADAMS, **by("muon")}
    stages = [
        stage_of([a], steps=1, combine="single"),
        stage_of([b], steps=1, combine="single"),
        stage_of([a], adams=muon, combine="single", inherit="a"),
    ]
    with pytest.raises(ValueError, match="'a' goes on by the update rule 'muon'; its state was"):
        Trainer(small_model(), stages)
    stages[2] = stage_of([a], adams=muon, combine="single")
    run(Trainer(small_model(), stages), 3)

    parent = Trainer(small_model(), [stage_of("a", combine="single")])
    run(parent, 1)
    parent.save(Saver(tmp_path, WORLD), {}, blocking=True)
    child = Trainer(small_model(), [stage_of("a", adams=muon, combine="single", inherit="a")])
    said = "was made by the update rule 'megarlx.training.update_rules:AdamW'; .*Muon' cannot"
    with pytest.raises(CheckpointError, match=said):
        child.start_from(tmp_path / "iter_00000001")
    with pytest.raises(CheckpointError, match=said):
        child.resume(tmp_path / "iter_00000001")

    mixed = {"a": ADAMS["a"], "b": replace(ADAMS["a"], rule="muon")}
    rates = dict.fromkeys("ab", RATES["a"])
    with pytest.raises(ValueError, match="one state cannot have the settings"):
        Trainer(small_model(), [stage_of("ab", adams=mixed, rates=rates, of_gradients=True)])
    options = {"a": replace(mixed["b"], rule_options={"rounds": 4}), "b": mixed["b"]}
    with pytest.raises(ValueError, match="one state cannot have the settings"):
        Trainer(small_model(), [stage_of("ab", adams=options, rates=rates, of_gradients=True)])


def test_a_rule_that_cannot_be_made_is_named() -> None:
    for rule, options, said in (
        ("adam", {}, 'update rule is \'adam\'; allowed are "adamw", "muon", module:Class'),
        ("muon", {"beta": 1}, "'muon' cannot be made with rule_options {'beta': 1}: .*'beta'"),
        ("muon", {"rounds": 0}, "rounds is 0"),
        (f"{__name__}:Path", {}, "cannot be made|has no state, whole, delta"),
    ):
        with pytest.raises(plug.PlugError, match=said):
            rule_of(UpdateSettings(rule=rule, rule_options=options))


def test_a_configuration_names_a_rule_for_each_objective() -> None:
    given: dict[str, Any] = {
        "steps": 3,
        "combine": "average",
        "objectives": {"sft": {"lr": 1e-3, "rule": "muon", "rule_options": {"momentum": 0.9}},
                       "rl": {"lr": 1e-3}},
    }  # fmt: skip
    stage = StageConfig.model_validate(given)
    sft, rl = (UpdateSettings.of(stage.objectives[name]) for name in ("sft", "rl"))
    assert (sft.rule, dict(sft.rule_options)) == ("muon", {"momentum": 0.9})
    assert rl == UpdateSettings(rule="adamw")
    with pytest.raises(ValueError, match="rule"):
        OptimizerConfig.model_validate({"rule": "adam"})
    with pytest.raises(ValueError, match="settings must be the same"):
        StageConfig.model_validate({**given, "of": "gradients"})
