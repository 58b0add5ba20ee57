"""Rotation tables are the same numbers on every device."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import FAMILIES, small

from megarlx.model import rope


@pytest.mark.parametrize("family", FAMILIES)
def test_frequencies_are_made_on_the_cpu_whatever_the_default_device_is(family: str) -> None:
    config = small(family)
    with torch.device("meta"):
        radians = rope.frequencies(config, 10_000.0)
    assert radians.device.type == "cpu"
    assert torch.equal(radians, rope.frequencies(config, 10_000.0))


def test_tables_of_a_double_run_are_cos_and_sin_of_the_exact_angle() -> None:
    """In fp32 they are off by more than 1e-9, and differently so on a CPU and on a GPU."""
    radians = rope.frequencies(small("llama3"), 10_000.0)
    places = [0, 1, 7, 1000, 4095]
    cos, sin = rope.rotation(torch.tensor(places), radians, torch.float64)
    for row, place in enumerate(places):
        for column, radian in enumerate(radians.tolist()):
            # both factors are whole multiples of a power of two: their product has 36 bits
            assert cos[row, 0, column].item() == pytest.approx(math.cos(place * radian), abs=1e-15)
            assert sin[row, 0, column].item() == pytest.approx(math.sin(place * radian), abs=1e-15)


def test_tables_of_narrower_runs_are_rounded_once_from_single_precision() -> None:
    radians, places = rope.frequencies(small("qwen3"), 10_000.0), torch.tensor([3, 500])
    exact = (places[:, None, None].float() * radians).cos()
    cos, _ = rope.rotation(places, radians, torch.float32)
    assert torch.equal(cos, exact)
    cos, _ = rope.rotation(places, radians, torch.bfloat16)
    assert torch.equal(cos, exact.bfloat16())
