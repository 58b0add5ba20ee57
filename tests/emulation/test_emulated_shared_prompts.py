"""A decoder over shared prompts on the CUDA kernels draws the tokens of the CPU's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megarlx.config.families import listed
from megarlx.generation.decoders import choose, in_place
from megarlx.generation.decoders.in_place import InPlaceDecoder
from megarlx.generation.decoders.stage import StageDecoder
from megarlx.generation.requests import SamplingSettings

CASES = Path(__file__).resolve().parents[1] / "unit" / "generation"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_token_differs(
    dtype: torch.dtype,
    emulated_kernels: Any,
    launches: Callable[[str], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(CASES)
    stand = importlib.import_module("flash_stand_ins").Stand()
    cases = importlib.import_module("generation_cases")
    stage, requests = cases.small_stage("olmo2", dtype), cases.mixed_requests(4, 4, new=6)
    settings = SamplingSettings(stop_tokens=(11, 60))
    expected = cases.engine(stage).generate(requests, settings, seed=3)
    implements = InPlaceDecoder.implements
    assert implements is not None
    monkeypatch.setattr(choose, "DECODERS", (InPlaceDecoder, StageDecoder))
    monkeypatch.setattr(InPlaceDecoder, "implements", implements | listed(Stage="device=cpu"))
    monkeypatch.setattr(
        in_place, "decode_attention", lambda q, cache, form, _: stand.flash.decode(q, cache, form)
    )
    kept = cases.engine(stage)
    with emulated_kernels:
        found = kept.generate(requests, settings, seed=3)
    merges = kept.counts.steps * stage.config.layers
    assert launches("merge_attention_kernel") >= merges > 0
    assert stand.read["shared"] > 0
    pairs = list(zip(found, expected, strict=True))
    differ = [a.sequence_id for a, b in pairs if not torch.equal(a.tokens, b.tokens)]
    assert differ == []  # of 16 sequences
    for one, other in pairs:
        torch.testing.assert_close(one.logprobs, other.logprobs, rtol=1e-4, atol=1e-4)
