"""What tools/same_weights.py calls the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from same_weights import RECIPES, difference


def test_one_bit_one_shape_or_one_name_is_a_difference():
    one = {"a": torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)}
    assert difference(one, {"a": one["a"].clone()}) == 0
    bit = torch.nextafter(one["a"], torch.tensor(9.0, dtype=torch.float64))
    assert 0 < difference(one, {"a": bit}) < 1e-15
    assert difference(one, {"a": one["a"] + torch.tensor([0.3, 0, 0])}) == pytest.approx(0.1)
    for other in ({"b": one["a"]}, {"a": one["a"][:2]}, {**one, "b": one["a"]}, {}):
        assert difference(one, other) == float("inf")
    assert difference({}, {}) == float("inf")  # nothing was compared


def test_recipes_cover_every_way_to_combine_objectives_and_both_axes_of_a_model():
    text = "\n".join(recipe.stages for recipe in RECIPES.values())
    for combine in ("alternate", "average"):
        assert f'combine = "{combine}"' in text
    assert 'of = "gradients"' in text
    assert 'placement = "replicas"' in text
    settings = {key for recipe in RECIPES.values() for key in recipe.settings}
    assert settings >= {"layout.tensor", "layout.pipeline", "rl.policy.preset", "rl.policy.loss"}
