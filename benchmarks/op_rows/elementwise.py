"""RMSNorm, SwiGLU and the attention's heads, forward and backward, against torch and a copy.

Letters: T tokens, d hidden size, F inner size, H heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import Row, interleaved_seconds, row
from torch import Tensor

from megarlx.ops.elementwise import (
    attention_heads,
    attention_heads_reference,
    rms_norm,
    rms_norm_reference,
    swiglu,
    swiglu_reference,
)

Results = Tensor | tuple[Tensor, ...]
TOKENS = 2048
SIZES = ((64, 160, 2), (192, 512, 4), (640, 1728, 10))  # d, F, H of the training benchmark


def both_ways(function: Callable[..., Results], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    upstream: list[Tensor] = []

    def run() -> object:
        results = function(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        if not upstream:
            upstream.extend(torch.randn_like(r) for r in results)
        return torch.autograd.grad(results, leaves, upstream)

    return run


def compare(
    name: str,
    size: str,
    ours: Callable[..., Results],
    reference: Callable[..., Results],
    inputs: tuple[Tensor, ...],
    floats: int,
) -> list[Row]:
    """`floats`: what forward and backward must read and write at least."""
    source, target = torch.randn(1 << 24), torch.empty(1 << 24)
    seconds = interleaved_seconds(
        {
            "ours": both_ways(ours, inputs),
            "eager": both_ways(reference, inputs),
            "compile": both_ways(torch.compile(reference), inputs),
            "copy": lambda: target.copy_(source),
        },
        budget_seconds=5.0,
    )
    spent = 1e3 * seconds["ours"]
    return [
        row(name, size, spent, 1e3 * seconds["eager"], "torch eager", "ms"),
        row(name, size, spent, 1e3 * seconds["compile"], "torch.compile", "ms"),
        row(
            name,
            size,
            4 * floats / seconds["ours"] / 1e9,
            8 * source.numel() / seconds["copy"] / 1e9,
            "copy",
            "GB/s",
        ),
    ]


def rows() -> list[Row]:
    found: list[Row] = []
    for d, inner, heads in SIZES:
        x, weight, residual = torch.randn(TOKENS, d), torch.randn(d), torch.randn(TOKENS, d)
        found += compare(
            "rms_norm + residual",
            f"T={TOKENS} d={d}",
            lambda x, w, r: rms_norm(x, w, 1e-6, r),
            lambda x, w, r: rms_norm_reference(x, w, 1e-6, r),
            (x, weight, residual),
            TOKENS * d * (3 + 3),
        )
        found += compare(
            "swiglu",
            f"T={TOKENS} F={inner}",
            swiglu,
            swiglu_reference,
            (torch.randn(TOKENS, 2 * inner),),
            TOKENS * inner * (3 + 5),
        )
        angle = torch.randn(TOKENS, 1, d // heads // 2)
        turn = (angle.cos(), angle.sin())

        def with_norms(
            function: Callable[..., Results],
            turn: tuple[Tensor, Tensor] = turn,
            heads: int = heads,
        ) -> Callable[..., Results]:
            return lambda qkv, q_weight, k_weight: function(
                qkv, *turn, heads, heads, q_weight=q_weight, k_weight=k_weight, eps=1e-6
            )

        found += compare(
            "QK-norm and rotation",
            f"T={TOKENS} d={d} H={heads}",
            with_norms(attention_heads),
            with_norms(attention_heads_reference),
            (torch.randn(TOKENS, 3 * d), torch.randn(d), torch.randn(d)),
            TOKENS * d * (4 + 8),
        )
    return found
