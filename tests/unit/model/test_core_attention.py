"""The kind of attention that was asked for is the one that computes."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megarlx.model import attention as paths
from megarlx.model.attention_form import AttentionForm
from megarlx.model.core_attention import CoreAttention
from megarlx.model.documents import Documents, padded_length
from megarlx.model.kv_cache import CacheStep, KVCache, PageTable

HEADS, KV_HEADS, DIM = 4, 2, 24
FORM = AttentionForm(DIM**-0.5)
LENGTHS = [130, 7, 63]


class Fused(nn.Module):
    """Stands for Transformer Engine's module: attention by SDPA, and what it was told."""

    def __init__(self, heads: int, head_dim: int, **options: Any) -> None:
        super().__init__()
        self.made, self.told = {"heads": heads, "head_dim": head_dim, **options}, {}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **told: Any) -> Tensor:
        self.told = told
        documents = Documents(told["cu_seqlens_q"], told["max_seqlen_q"], len(q))
        out = paths.attention(
            q, k, v, documents=documents, form=AttentionForm(self.made["softmax_scale"])
        )
        return out.flatten(1)  # as Transformer Engine returns it


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    package = types.ModuleType("transformer_engine")
    package.pytorch = types.ModuleType("transformer_engine.pytorch")  # type: ignore[attr-defined]
    package.pytorch.DotProductAttention = Fused  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", package.pytorch)
    monkeypatch.delitem(sys.modules, "megarlx.model.attention_te", raising=False)
    for name in ("FUSED", "FLASH", "UNFUSED"):
        monkeypatch.setenv(f"NVTE_{name}_ATTN", "1")


def projections(tokens: int = sum(LENGTHS)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(tokens, n, DIM, generator=generator) for n in (HEADS, KV_HEADS, KV_HEADS)]


def test_cudnn_goes_through_transformer_engine_and_no_other_kernel_of_it(engine: None) -> None:
    core = CoreAttention(HEADS, KV_HEADS, DIM, layer_number=3, form=FORM, kind="cudnn")
    documents, (q, k, v) = Documents.of(LENGTHS), projections()
    out = core(q, k, v, documents, None)
    expected = paths.attention(q, k, v, documents=documents, form=FORM)
    assert out.shape == q.shape
    torch.testing.assert_close(out, expected)
    assert core.packed.packed.made["num_gqa_groups"] == KV_HEADS
    assert core.packed.packed.made["layer_number"] == 3
    chosen = [os.environ[f"NVTE_{name}_ATTN"] for name in ("FUSED", "FLASH", "UNFUSED")]
    assert chosen == ["1", "0", "0"]
    assert not list(core.parameters())


def test_few_bounds_are_told_to_cudnn_and_none_above_the_tokens(engine: None) -> None:
    """It plans for each anew."""
    core = CoreAttention(HEADS, KV_HEADS, DIM, layer_number=1, form=FORM, kind="cudnn")
    told = set()
    for longest in range(100, 180):
        documents = Documents.of([longest, 100])
        core(*projections(longest + 100), documents, None)
        bound = core.packed.packed.told["max_seqlen_q"]
        assert longest <= bound == core.packed.packed.told["max_seqlen_kv"]
        told.add(bound)
    assert len(told) <= 6
    core(*projections(130), Documents.of([130]), None)
    assert core.packed.packed.told["max_seqlen_q"] == 130 < padded_length(130)


def test_generation_goes_past_transformer_engine_since_it_owns_the_cache(engine: None) -> None:
    core = CoreAttention(HEADS, KV_HEADS, DIM, layer_number=1, form=FORM, kind="cudnn")
    cache = KVCache.empty(1, PageTable.of_slots(3, 16), KV_HEADS, DIM, dtype=torch.float32)
    step = CacheStep(cache, Documents.of([5, 4]), torch.tensor([2, 0]), torch.zeros(2).long(), 16)
    out = core(*projections(9), Documents.of([5, 4]), step.layer(0))
    assert out.shape == (9, HEADS, DIM)
    assert not core.packed.packed.told


def test_sdpa_asks_for_no_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        asked.append(options["kernel"])
        return q

    monkeypatch.setattr("megarlx.model.core_attention.attention", attention)
    for kind in ("auto", "flash", "sdpa"):
        core = CoreAttention(HEADS, KV_HEADS, DIM, layer_number=1, form=FORM, kind=kind)  # type: ignore[arg-type]
        core(*projections(), Documents.of(LENGTHS), None)
    assert asked == ["auto", "flash", "sdpa"]
