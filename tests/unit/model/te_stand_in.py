"""Stands for Transformer Engine: as much of its modules as layers_te.py uses, in plain torch."""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megarlx.model import attention as paths
from megarlx.model.attention_form import AttentionForm
from megarlx.model.documents import Documents


class Fused(torch.autograd.Function):
    """With `main_grad`, backward adds the weight's gradient there and gives autograd none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, fuses: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.fuses = weight, fuses
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        made: Tensor | None = upstream.t() @ x
        if ctx.fuses:
            ctx.weight.main_grad.addmm_(upstream.t(), x)
            made = None
        return upstream @ weight, made, None


class Linear(nn.Module):
    def __init__(
        self, rows: int, columns: int, *, bias: bool, fuse_wgrad_accumulation: bool,
        params_dtype: torch.dtype, device: Any, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.fuse_wgrad_accumulation, self.options = fuse_wgrad_accumulation, options
        self.weight = nn.Parameter(torch.empty(columns, rows, dtype=params_dtype, device=device))
        empty = torch.empty(columns if bias else 0, dtype=params_dtype, device=device)
        self.bias = nn.Parameter(empty) if bias else empty
        self.quantizers = {"what": "nobody", "knows": object()}

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Fused.apply(x, self.weight, self.fuse_wgrad_accumulation)
        return out + self.bias if self.bias.numel() else out


class RMSNorm(nn.Module):
    def __init__(
        self, size: int, *, eps: float, zero_centered_gamma: bool, sequence_parallel: bool,
        dtype: torch.dtype, device: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        weight = 1 + self.weight if self.zero_centered_gamma else self.weight
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)


class DotProductAttention(nn.Module):
    def __init__(self, heads: int, head_dim: int, **options: Any) -> None:
        super().__init__()
        self.options, self.inner = options, nn.Identity()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **told: Any) -> Tensor:
        documents = Documents(told["cu_seqlens_q"], told["max_seqlen_q"], len(q))
        form = AttentionForm(self.options["softmax_scale"])
        return paths.attention(q, k, v, documents=documents, form=form).flatten(1)


@pytest.fixture
def transformer_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    recipe: Any = types.ModuleType("transformer_engine.common.recipe")
    names = ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling")
    for name in ("Recipe", *names):
        setattr(recipe, name, type(name, (), {}))
    pytorch: Any = types.ModuleType("transformer_engine.pytorch")
    pytorch.Linear, pytorch.RMSNorm = Linear, RMSNorm
    pytorch.DotProductAttention = DotProductAttention
    pytorch.checkpoint, pytorch.autocast = checkpoint, contextlib.nullcontext
    common: Any = types.ModuleType("transformer_engine.common")
    package: Any = types.ModuleType("transformer_engine")
    package.__spec__ = importlib.machinery.ModuleSpec("transformer_engine", None)
    common.recipe, package.pytorch, package.common = recipe, pytorch, common
    for name, module in (("", package), (".pytorch", pytorch), (".common", common)):
        monkeypatch.setitem(sys.modules, f"transformer_engine{name}", module)
    monkeypatch.setitem(sys.modules, "transformer_engine.common.recipe", recipe)
    for name in ("layers_te", "attention_te"):
        monkeypatch.delitem(sys.modules, f"megarlx.model.{name}", raising=False)
    for name in ("FUSED", "FLASH", "UNFUSED"):
        monkeypatch.setenv(f"NVTE_{name}_ATTN", "1")
    yield
    for name in ("layers_te", "attention_te"):  # made of what stands here
        sys.modules.pop(f"megarlx.model.{name}", None)
