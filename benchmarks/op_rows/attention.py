"""Causal attention over documents in fp32, forward and backward, against torch's SDPA.

Letters: N documents, L tokens of each, H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import Row, interleaved_seconds, row
from torch import Tensor

from megarlx.ops.attention import packed_attention

# N, L, H, K, D: of the training benchmark, grouped heads, and short documents
SIZES = ((16, 128, 2, 2, 32), (16, 128, 4, 4, 48), (8, 256, 5, 5, 64), (4, 512, 10, 10, 64))
OTHERS = ((2, 1024, 4, 4, 64), (16, 128, 8, 2, 32), (64, 24, 2, 2, 32))


def of_torch(q: Tensor, k: Tensor, v: Tensor, shape: tuple[int, int]) -> Tensor:
    q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=1.0, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).flatten(0, 1)


def rows() -> list[Row]:
    found: list[Row] = []
    for n, length, heads, kv_heads, dim in (*SIZES, *OTHERS):
        tokens = n * length
        inputs = [torch.randn(tokens, h, dim) for h in (heads, kv_heads, kv_heads)]
        leaves = [(x * dim**-0.25).requires_grad_() for x in inputs]
        offsets = torch.arange(0, tokens + 1, length, dtype=torch.int32)
        upstream = torch.randn(tokens, heads, dim)

        def both_ways(
            forward: Callable[..., Tensor],
            leaves: list[Tensor] = leaves,
            upstream: Tensor = upstream,
        ) -> Callable[[], object]:
            return lambda: torch.autograd.grad(forward(*leaves), leaves, upstream)

        calls = {
            "ours": both_ways(lambda q, k, v, at=offsets: packed_attention(q, k, v, at, 1.0)),
            "torch": both_ways(lambda q, k, v, at=(n, length): of_torch(q, k, v, at)),
        }
        seconds = interleaved_seconds(calls, pairs=31, budget_seconds=4.0)
        size = f"N={n} L={length} H={heads} K={kv_heads} D={dim}"
        ours, theirs = 1e3 * seconds["ours"], 1e3 * seconds["torch"]
        found.append(row("packed_attention", size, ours, theirs, "torch SDPA", "ms"))
    return found
