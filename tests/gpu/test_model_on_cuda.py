"""The engines of a CUDA machine against the one that runs everywhere."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megarlx.config.model import family_config
from megarlx.model.attention import attention
from megarlx.model.attention_form import AttentionForm
from megarlx.model.documents import Documents
from megarlx.model.kv_cache import CacheStep, KVCache, PageTable
from megarlx.model.transformer import Stage
from megarlx.ops import Head, LossInputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
HAS_FLASH = importlib.util.find_spec("flash_attn") is not None
HAS_TE = importlib.util.find_spec("transformer_engine") is not None
needs_flash = pytest.mark.skipif(not HAS_FLASH, reason="flash_attn is not installed")
needs_te = pytest.mark.skipif(not HAS_TE, reason="transformer_engine is not installed")

LENGTHS = [100, 17, 300, 1, 64]
SCALE = 0.125


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double().cpu() - b.double().cpu()).norm() / b.double().cpu().norm()).item()


def random_qkv(tokens: int, kv_heads: int, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    drawn = [torch.randn(tokens, n, 64, generator=generator) for n in (8, kv_heads, kv_heads)]
    return [x.bfloat16().to(device).requires_grad_() for x in drawn]


@needs_flash
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_flash_attention_equals_sdpa_forward_and_backward(kv_heads: int) -> None:
    ours = random_qkv(sum(LENGTHS), kv_heads, "cuda")
    theirs = [x.detach().double().cpu().requires_grad_() for x in ours]
    out = attention(*ours, documents=Documents.of(LENGTHS, "cuda"), form=AttentionForm(SCALE))
    expected = attention(*theirs, documents=Documents.of(LENGTHS), form=AttentionForm(SCALE))
    assert relative(out, expected) < 1e-2
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(out, ours, upstream.to(out))
    for a, b in zip(gradients, torch.autograd.grad(expected, theirs, upstream), strict=True):
        assert relative(a, b) < 2e-2


@needs_flash
@pytest.mark.parametrize("lengths", [[1, 1, 1], [5, 1, 90]], ids=str)
@pytest.mark.parametrize("slots", [[0, 1, 2], [3, 0, 2]])
def test_cached_flash_attention_equals_sdpa(lengths: list[int], slots: list[int]) -> None:
    starts, results = [40, 3, 129], {}
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float64)):
        torch.manual_seed(0)
        cache = KVCache.empty(1, PageTable.of_slots(4, 256, device), 2, 64, dtype=dtype)
        cache.keys.copy_(torch.randn(cache.keys.shape).bfloat16())
        cache.values.copy_(torch.randn(cache.values.shape).bfloat16())
        q, k, v = (x.detach().to(dtype) for x in random_qkv(sum(lengths), 2, device))
        documents = Documents.of(lengths, device)
        index = torch.tensor(slots, device=device)
        step = CacheStep(cache, documents, index, torch.tensor(starts, device=device), 256)
        out = attention(
            q, k, v, documents=documents, form=AttentionForm(SCALE), cache=step.layer(0)
        )
        results[device] = out
    assert relative(results["cuda"], results["cpu"]) < 1e-2


def plain_loss(head: Head, inputs: LossInputs) -> Any:
    logits = F.linear(head.hidden, head.weight[: head.vocab_size]).float()
    return SimpleNamespace(loss=F.cross_entropy(logits, inputs.targets))


def trained_once(
    backend: str, family: str, fp8: str | None = None, attention: str = "auto"
) -> tuple[float, dict]:
    config = family_config(
        family,
        vocab_size=1000,
        hidden_size=512,
        layers=2,
        heads=8,
        kv_heads=8,
        head_dim=64,
        intermediate_size=1024,
    )
    stage = Stage(
        config,
        backend=backend,
        attention=attention,  # type: ignore[arg-type]
        fp8=fp8,
        dtype=torch.bfloat16,
        device="cuda",
    )
    stage.initialise_(1)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1000, (512,), generator=generator).cuda()
    documents = Documents.of([200, 56, 256], "cuda")
    learned = LossInputs(tokens.roll(-1))
    loss = stage(tokens, loss=plain_loss, documents=documents, loss_inputs=learned)
    loss.backward()
    gradients = {name: p.grad for name, p in stage.named_parameters()}
    assert gradients.keys() == stage.layouts.keys()
    return loss.item(), gradients


@needs_te
@pytest.mark.parametrize("family", ["olmo2", "llama3", "qwen2", "qwen3"])
@pytest.mark.parametrize("backend", ["torch", "te"])
def test_transformer_engine_layers_and_cudnn_equal_torch(family: str, backend: str) -> None:
    expected, expected_gradients = trained_once("torch", family, attention="sdpa")
    loss, gradients = trained_once(backend, family, attention="cudnn")
    assert abs(loss - expected) < 1e-2 * expected
    for name, gradient in gradients.items():
        assert relative(gradient, expected_gradients[name]) < 5e-2, name


@needs_te
@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_fp8_recipes_stay_near_half_precision(recipe: str) -> None:
    expected, _ = trained_once("te", "llama3")
    loss, gradients = trained_once("te", "llama3", fp8=recipe)
    assert abs(loss - expected) < 5e-2 * expected
    assert all(g.isfinite().all() for g in gradients.values())
