"""The gap between sampling and training is near nothing, and a gap that is there is seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from generation_cases import FAMILIES, mixed_requests, prompt, small

from megarlx.comm.groups import Mesh
from megarlx.generation.engine import Engine
from megarlx.generation.logprob_gap import logprob_gap, training_logprobs
from megarlx.generation.requests import Request, SamplingSettings
from megarlx.model.build import build_model


@pytest.mark.parametrize("tokens_per_pass", [64, 4096])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gap_is_rounding_alone(family: str, tokens_per_pass: int) -> None:
    model = build_model(small(family), Mesh.alone(), seed=3)
    found = Engine.of(model, slots=32, longest=64).generate(
        mixed_requests(6, 5), SamplingSettings(temperature=0.8, top_k=50), seed=2
    )
    gap = logprob_gap(model, found, tokens_per_pass=tokens_per_pass)
    assert 0 < gap.mean <= gap.max <= 1e-5
    assert abs(gap.kl) <= 1e-9
    assert gap.tokens == sum(len(c.tokens) for c in found)


def test_a_gap_is_measured_as_it_is_defined() -> None:
    model = build_model(small("olmo2"), Mesh.alone(), seed=3)
    requests = [Request(prompt(5, 1), (0, 1), 10)]
    found = Engine.of(model, slots=2, longest=32).generate(requests, SamplingSettings(), seed=2)
    shifted = found[0].logprobs.clone()
    shifted[4] -= 0.5
    gap = logprob_gap(model, [replace(found[0], logprobs=shifted), found[1]])
    assert gap.max == pytest.approx(0.5, abs=1e-5)
    assert gap.mean == pytest.approx(0.5 / 20, abs=1e-5)
    assert gap.kl == pytest.approx((torch.tensor(0.5).exp().item() - 1.5) / 20, abs=1e-5)


def test_nothing_generated_is_no_gap() -> None:
    model = build_model(small("olmo2"), Mesh.alone(), seed=3)
    gap = logprob_gap(model, [])
    assert (gap.mean, gap.max, gap.kl, gap.tokens) == (0.0, 0.0, 0.0, 0)
    assert training_logprobs(model, []) == []
