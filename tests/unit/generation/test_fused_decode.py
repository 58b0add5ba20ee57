"""What the decode step of a CPU does besides being right: nothing it need not do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation_cases import FAMILIES, OF_FAMILY, engine, mixed_requests, small_stage
from torch.utils._python_dispatch import TorchDispatchMode

from megarlx.generation.decoders.fused import FusedDecoder
from megarlx.generation.requests import SamplingSettings
from megarlx.generation.rows import Sequence

NATIVE = [family for family in FAMILIES if family not in OF_FAMILY]


class Recorded(TorchDispatchMode):
    """Names of the operations, and whether they gave memory that was not there before."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.made_memory: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {
            t.untyped_storage().data_ptr()
            for t in (*args, *kwargs.values())
            if isinstance(t, torch.Tensor)
        }
        out = func(*args, **kwargs)
        self.names.append(func.name())
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:
            self.made_memory.append(func.name())
        return out


@pytest.mark.parametrize("family", NATIVE)
def test_a_decode_step_makes_no_tensor_and_few_calls(family: str) -> None:
    stage = small_stage(family)
    kept = engine(stage)
    kept.generate(mixed_requests(4, 4), SamplingSettings(), seed=1)
    decoder, rows = kept.decoders[0], kept.rows[0]
    with torch.no_grad(), Recorded() as recorded:
        decoder.forward(rows, rows.live)
        decoder.logits(rows.live)
    assert recorded.made_memory == []
    assert [n for n in recorded.names if "mm" in n or "megarlx" in n] == ["megarlx::decode_step_"]


def test_a_step_of_parts_equals_the_step_in_one_call_and_makes_no_tensor() -> None:
    """FusedDecoder serves tensor parallelism; on a group of one it can be compared."""
    for family in NATIVE:
        stage = small_stage(family, torch.float64)
        kept = engine(stage)
        kept.generate(mixed_requests(4, 4), SamplingSettings(), seed=1)
        whole, rows = kept.decoders[0], kept.rows[0]
        for row in range(16):
            request = mixed_requests(4, 4)[row // 4]
            rows.put(row, Sequence(row, row // 4, request, row), row)
        parts = FusedDecoder(stage, kept.caches[0], 16)
        with torch.no_grad():
            expected = whole.forward(rows, 16).clone()
            expected_logits = whole.logits(16).clone()
            with Recorded() as recorded:
                found = parts.forward(rows, 16)
                found_logits = parts.logits(16)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(found_logits, expected_logits, rtol=1e-11, atol=1e-11)
        assert recorded.made_memory == []
        working = [n for n in recorded.names if "mm" in n or "megarlx" in n or "add" in n]
        biases = stage.config.layers if stage.config.qkv_bias else 0
        assert len(working) <= 8 * stage.config.layers + 3 + biases


def test_rows_of_padding_are_numbers_and_change_nothing() -> None:
    stage = small_stage()
    kept = engine(stage, slots=64, one_width=True)
    first = kept.generate(mixed_requests(4, 16), SamplingSettings(), seed=1)
    again = kept.generate(mixed_requests(1, 2), SamplingSettings(), seed=1)
    alone = engine(stage, slots=64, one_width=True).generate(
        mixed_requests(1, 2), SamplingSettings(), seed=1
    )
    assert len(first) == 64
    for a, b in zip(again, alone, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.logprobs, b.logprobs)
    assert torch.isfinite(kept.decoders[0].hidden(64)).all()
