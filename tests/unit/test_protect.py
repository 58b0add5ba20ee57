"""Weights that an objective leaves alone: which they are, and that no update moves them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from stage_cases import ADAMS, RATES, objective, small_model
from torch import Tensor

from megarlx.checkpoint import Saver
from megarlx.comm.groups import Group
from megarlx.config.stages import ProtectConfig
from megarlx.training.combine import projection, weighted_sum
from megarlx.training.parts import UpdateSettings
from megarlx.training.protect import ProtectError, largest, protected_mask
from megarlx.training.trainer import TrainedObjective, Trainer, TrainingStage

WORLD = Group.alone("world")
MUON = UpdateSettings(weight_decay=0.3, rule="muon")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from([0.0, 1e-30, 0.5, 0.5000001, 3.0, 1e30]), min_size=1, max_size=40),
    st.data(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_the_threshold_is_the_order_statistic(
    numbers: list[float], draws: Any, dtype: torch.dtype
) -> None:
    values = torch.tensor(numbers, dtype=dtype)
    place = draws.draw(st.integers(1, len(numbers)))
    cut = draws.draw(st.integers(0, len(numbers)))
    found = largest(values, place, [(0, cut), (cut, len(numbers))], [])
    assert found == values.sort(descending=True).values[place - 1]


def stages(mask: Tensor, how: str, rule: UpdateSettings | None) -> list[TrainingStage]:
    """Without protection, so that there are moments, and then with it."""
    names = "a" if how == "single" else "ab"
    made = {name: objective(name) for name in names}
    options: dict[str, Any] = {"combine": "single" if how == "single" else "average"}
    if how == "gradients":
        options["shared_moments"] = True
    if how == "local":
        options["sync_every"] = 2
    options["combination"] = projection if how == "projection" else weighted_sum

    def stage(protected: Tensor | None) -> TrainingStage:
        one = rule or ADAMS["a"]
        members = [
            TrainedObjective(made[n], one, RATES["c"], inherit=True, protected=protected)
            for n in names
        ]
        return TrainingStage(members, steps=4, **options)

    return [stage(None), stage(mask)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rule", [None, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("how", ["single", "average", "gradients", "local", "projection"])
def test_protected_weights_stay_bit_for_bit_under_decay_and_old_moments(
    how: str, rule: UpdateSettings | None, dtype: torch.dtype
) -> None:
    model = small_model(dtype=dtype)
    mask = torch.rand(model.data_parallel.weights.shape) < 0.3
    trainer = Trainer(model, stages(mask, how, rule))
    for _ in range(4):
        trainer.step()
    kept = trainer.optimizer.master
    if how in ("single", "average", "gradients"):  # others add up zeros, and 0.0 may become of it
        kept[0], mask[0] = -0.0, True
    trainer.optimizer.masters.to_weights()
    before, rounded = kept.clone(), model.data_parallel.weights.clone()
    for _ in range(4):
        trainer.step()
    after, weights = trainer.optimizer.master, model.data_parallel.weights
    assert trainer.stage_index == 1
    for one, other in ((before, after), (rounded, weights)):
        assert torch.equal(one[mask].view(torch.uint8), other[mask].view(torch.uint8))
    moved = (before != after)[~mask & (before != 0)].double().mean()  # padding is 0
    assert moved > 0.95


def test_what_is_not_protected_moves_as_it_would() -> None:
    masters = []
    for share in (0.0, 0.3):
        model = small_model()
        mask = torch.rand(model.data_parallel.weights.shape, generator=torch.manual_seed(2)) < share
        member = TrainedObjective(objective("a"), ADAMS["a"], RATES["a"], protected=mask)
        trainer = Trainer(model, [TrainingStage([member], combine="single")])
        trainer.step()
        masters.append(trainer.optimizer.master.clone())
    torch.testing.assert_close(masters[0][~mask], masters[1][~mask], rtol=1e-14, atol=0)


def saved(folder: Path, seed: int) -> Path:
    member = TrainedObjective(objective("a"), ADAMS["a"], RATES["a"])
    trainer = Trainer(small_model(seed), [TrainingStage([member], combine="single")])
    trainer.save(Saver(folder, WORLD), {}, blocking=True)
    return folder / "iter_00000000"


def test_the_share_that_moved_most_is_protected(tmp_path: Path) -> None:
    moved, start = (saved(tmp_path / str(seed), seed) for seed in (1, 2))
    model = small_model()
    one, other = (small_model(seed).data_parallel.weights for seed in (1, 2))
    away = (one - other).abs()
    count = sum(map(math.prod, model.config.tensor_shapes().values()))
    for share in (0.01, 0.05, 0.5):
        mask = protected_mask(model, moved, start, share)
        wanted = round(share * count)
        assert mask.sum() == wanted
        assert away[mask].min() == away.sort(descending=True).values[wanted - 1]
    with pytest.raises(ProtectError, match=r"share = 0.05 asks for .* moved fewer of them"):
        protected_mask(model, moved, moved, 0.05)


def test_what_is_protected_is_named_by_its_step() -> None:
    assert ProtectConfig(run="runs/a@b@40").share == 0.05
    for run in ("runs/a", "runs/a@latest", "@40"):
        with pytest.raises(ValidationError, match=f"run: is '{run}'; allowed is RUN@N"):
            ProtectConfig(run=run)
