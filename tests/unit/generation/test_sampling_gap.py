"""What sampling says of its tokens is what a pass over the whole text says, but for rounding."""

from __future__ import annotations

import pytest
from generation_cases import FAMILIES, mixed_requests, small
from sampling_gap import sampling_gap

from megarlx.comm.groups import Mesh
from megarlx.generation.engine import Engine
from megarlx.generation.requests import SamplingSettings
from megarlx.model.build import build_model


@pytest.mark.parametrize("tokens_per_pass", [64, 4096])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gap_is_rounding_alone(family: str, tokens_per_pass: int) -> None:
    model = build_model(small(family), Mesh.alone(), seed=3)
    found = Engine.of(model, slots=32, longest=64).generate(
        mixed_requests(6, 5), SamplingSettings(temperature=0.8, top_k=50), seed=2
    )
    mean, largest, divergence, tokens = sampling_gap(model, found, tokens_per_pass=tokens_per_pass)
    assert 0 < mean <= largest <= 1e-5
    assert abs(divergence) <= 1e-9
    assert tokens == sum(len(c.tokens) for c in found)
