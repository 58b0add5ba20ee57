"""Attention in plain torch by blocks of queries: windows, soft-caps, groups and caches, anywhere.

Scores exist of one block and the keys that it sees, never of a whole square. Backward makes a
block's scores again, so that nothing but q, k and v is kept, and it may run twice.

Letters: T tokens, n documents of one length L, R rows of a block, U keys that it may see, H query
heads, K key/value heads, G = H / K, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megarlx.choices import SERVES
from megarlx.model.attention_form import QUERY_BLOCK, AttentionForm, continued_blocks
from megarlx.model.documents import Documents, from_buckets, to_buckets
from megarlx.model.kv_cache import LayerCache


class _Blocks:
    serves = serves_packed = SERVES["blocks"]

    def packed(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, form: AttentionForm
    ) -> Tensor:
        if documents.equal is not None:
            shape = documents.equal
            whole: Tensor = _Packed.apply(*(x.unflatten(0, shape) for x in (q, k, v)), form)
            return whole.flatten(0, 1)
        buckets = documents.buckets
        parts = zip(*(to_buckets(x, buckets) for x in (q, k, v)), strict=True)
        return from_buckets([_Packed.apply(q, k, v, form) for q, k, v in parts], buckets)

    def decode(self, q: Tensor, cache: LayerCache, form: AttentionForm) -> Tensor:
        step = cache.step
        return block_attention(q[:, None], *cache.at(step.seen), step.starts, form)[:, 0]

    def continued(self, q: Tensor, cache: LayerCache, form: AttentionForm) -> Tensor:
        out = torch.empty_like(q)
        for block in continued_blocks(q, cache):
            rows = q[block.places].unflatten(0, (-1, block.rows))
            found = block_attention(rows, block.keys, block.values, block.seen, form)
            out[block.places] = found.flatten(0, 1)
        return out


BLOCKS = _Blocks()


def block_attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor, form: AttentionForm) -> Tensor:
    """q [n, R, H, D], k and v [n, U, K, D] to [n, R, H, D]. Row r of document i stands at place
    first[i] + r of its keys; it sees itself and what is before it, as far as the window reaches."""
    (n, rows, heads, dim), (keys, kv_heads) = q.shape, k.shape[1:3]
    grouped = q.transpose(1, 2).reshape(n, kv_heads, -1, dim)
    scores = torch.matmul(grouped, k.permute(0, 2, 3, 1))
    scores = (scores if scores.dtype == torch.float64 else scores.float()) * form.scale
    if form.cap is not None:
        scores = form.cap * torch.tanh(scores / form.cap)
    place = first[:, None, None] + torch.arange(rows, device=q.device)[:, None]
    column = torch.arange(keys, device=q.device)
    seen = column <= place
    if form.window is not None:
        seen = seen & (column > place - form.window)
    scores = scores.unflatten(2, (-1, rows)).masked_fill(~seen[:, None, None], -torch.inf)
    weights = scores.softmax(-1).to(v.dtype).flatten(2, 3)
    out = torch.matmul(weights, v.transpose(1, 2))
    return out.view(n, heads, rows, dim).transpose(1, 2)


def _blocks(length: int, window: int | None) -> Iterator[tuple[int, int, int]]:
    """(first row, its end, first key that any of them sees)."""
    for start in range(0, length, QUERY_BLOCK):
        first_key = 0 if window is None else max(0, start - window + 1)
        yield start, min(start + QUERY_BLOCK, length), first_key


class _Packed(torch.autograd.Function):
    """[n, L, heads, D], all documents of one length."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, form: AttentionForm) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.form = form
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for start, stop, key in _blocks(q.shape[1], form.window):
            out[:, start:stop] = _one_block(q, k, v, start, stop, key, form)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        wide = torch.float64 if saved[0].dtype == torch.float64 else torch.float32
        totals = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in saved]
        for start, stop, key in _blocks(saved[0].shape[1], ctx.form.window):
            spans = (slice(start, stop), slice(key, stop), slice(key, stop))
            parts = [
                x[:, span].detach().requires_grad_() for x, span in zip(saved, spans, strict=True)
            ]
            with torch.enable_grad():
                place = _place(parts[0], start - key)
                q, k, v = parts
                out = block_attention(q, k, v, place, ctx.form)
            for total, span, grad in zip(
                totals, spans, torch.autograd.grad(out, parts, grads[0][:, start:stop]), strict=True
            ):
                total[:, span] += grad
        return *(t.to(x.dtype) for t, x in zip(totals, saved, strict=True)), None


def _one_block(
    q: Tensor, k: Tensor, v: Tensor, start: int, stop: int, key: int, form: AttentionForm
) -> Tensor:
    place = _place(q, start - key)
    return block_attention(q[:, start:stop], k[:, key:stop], v[:, key:stop], place, form)


def _place(q: Tensor, first: int) -> Tensor:
    return torch.full((1,), first, device=q.device)
