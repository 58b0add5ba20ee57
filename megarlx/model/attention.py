"""Causal attention over packed documents, with or without a cache: one function, several engines.

CUDA in half precision: flash-attn 3, 4 or 2, whichever is installed. Everything else: SDPA, which
never gets a mask of the whole square: documents go through it in buckets of equal length.
SDPA aligns its causal mask to the top left corner and flash-attn to the bottom right one. They
differ as soon as there are more keys than queries, so cached attention has its own functions here.

Letters: T tokens, N documents, H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megarlx.model.documents import Documents, from_buckets, to_buckets
from megarlx.model.kv_cache import LayerCache

# When cached sequences are continued by several tokens: rows of a mask, and what its columns are a
# multiple of.
QUERY_BLOCK, SPAN = 128, 64


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Documents,
    scale: float,
    cache: LayerCache | None = None,
    use_flash: bool = True,
) -> Tensor:
    """q [T, H, D], k and v [T, K, D] to [T, H, D]; no token sees another document or its future.

    With a cache the new keys and values are written first, then document i sees its whole slot.
    """
    if q.shape[0] != documents.tokens:
        raise ValueError(f"attention: q has {q.shape[0]} tokens, documents {documents.tokens}")
    half = q.dtype in (torch.float16, torch.bfloat16)
    flash = _flash() if use_flash and half and q.is_cuda else None
    if cache is not None:
        cache.write(k, v)
        if not cache.step.fresh:
            if cache.step.one_each:
                return _decode(q, cache, scale, flash)
            return _continue(q, cache, scale, flash)
    if flash is not None:
        return flash.packed(q, k, v, documents.offsets, documents.longest, scale)
    return _sdpa(q, k, v, documents, scale)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[documents, L, heads, D], all documents of one length."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> Tensor:
    if documents.equal is not None:
        shape = documents.equal
        q, k, v = (x.unflatten(0, shape) for x in (q, k, v))
        return _causal(q, k, v, scale).flatten(0, 1)
    buckets = documents.buckets
    parts = zip(*(to_buckets(x, buckets) for x in (q, k, v)), strict=True)
    return from_buckets([_causal(q, k, v, scale) for q, k, v in parts], buckets)


def _decode(q: Tensor, cache: LayerCache, scale: float, flash: _Flash | None) -> Tensor:
    """One new token a slot. The query heads that share a key head are its rows, so no key is
    repeated and none is copied where the slots are a slice."""
    step, (n, heads, dim) = cache.step, q.shape
    if flash is not None and flash.cached is not None:
        return flash.cached(q, cache, scale)
    keys, values = (t[step.slots, : step.span].transpose(1, 2) for t in (cache.keys, cache.values))
    rows = q.view(n, keys.shape[1], heads // keys.shape[1], dim)
    mask = step.visible.expand(n, 1, rows.shape[2], step.span)
    return F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale).reshape(
        q.shape
    )


def _continue(q: Tensor, cache: LayerCache, scale: float, flash: _Flash | None) -> Tensor:
    """Several new tokens behind what the slots already hold: the mask is bottom-right aligned."""
    step = cache.step
    slots, starts = step.slot_index.tolist(), step.starts.tolist()
    if flash is not None:
        return flash.continued(q, cache, slots, starts, scale)
    out = torch.empty_like(q)
    for (rows, span), alike in _continued_alike(starts, step.documents.lengths, cache).items():
        first = torch.tensor([place for _, place, _ in alike], device=q.device)
        seen = torch.tensor([start for _, _, start in alike], device=q.device)
        held = torch.tensor([slots[document] for document, _, _ in alike], device=q.device)
        ahead = torch.arange(rows, device=q.device)
        places = (first[:, None] + ahead).flatten()
        keys, values = (t[held, :span].transpose(1, 2) for t in (cache.keys, cache.values))
        last = (seen[:, None] + ahead)[:, None, :, None]  # the last place that a row sees
        out[places] = (
            F.scaled_dot_product_attention(
                q[places].unflatten(0, (len(alike), rows)).transpose(1, 2),
                keys,
                values,
                attn_mask=torch.arange(span, device=q.device) <= last,
                scale=scale,
                enable_gqa=q.shape[1] != keys.shape[1],
            )
            .transpose(1, 2)
            .flatten(0, 1)
        )
    return out


def _continued_alike(
    starts: list[int], lengths: Sequence[int], cache: LayerCache
) -> dict[tuple[int, int], list[tuple[int, int, int]]]:
    """(rows, span) -> blocks of (document, its first row in q, tokens before it). A block's span
    follows from its own document alone, so its neighbours in a call change none of its sums."""
    alike: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    begin, most = 0, cache.keys.shape[1]
    for document, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        for row in range(0, length, QUERY_BLOCK):
            rows = min(QUERY_BLOCK, length - row)
            span = min(-(-(start + row + rows) // SPAN) * SPAN, most)
            alike.setdefault((rows, span), []).append((document, begin + row, start + row))
        begin += length
    return alike


@dataclass(frozen=True)
class _Flash:
    """An installed flash-attn: its packed function, and the one that reads a cache if it has it."""

    version: int
    varlen: Callable[..., Tensor | tuple[Tensor, ...]]
    with_cache: Callable[..., Tensor | tuple[Tensor, ...]] | None

    def packed(
        self, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, scale: float
    ) -> Tensor:
        return _first(
            self.varlen(
                q,
                k,
                v,
                cu_seqlens_q=offsets,
                cu_seqlens_k=offsets,
                max_seqlen_q=longest,
                max_seqlen_k=longest,
                softmax_scale=scale,
                causal=True,
            )
        )

    @property
    def cached(self) -> Callable[[Tensor, LayerCache, float], Tensor] | None:
        return self._cached if self.with_cache is not None else None

    def _cached(self, q: Tensor, cache: LayerCache, scale: float) -> Tensor:
        step = cache.step
        assert self.with_cache is not None
        tables, index = (cache.keys, cache.values), None
        if isinstance(step.slots, slice):
            tables = (cache.keys[step.slots], cache.values[step.slots])
        else:
            index = step.slots.int()
        lengths = (step.starts + 1).int()
        out = self.with_cache(
            q.unsqueeze(1),
            *tables,
            cache_seqlens=lengths,
            cache_batch_idx=index,
            softmax_scale=scale,
            causal=True,
        )
        return _first(out).squeeze(1)

    def continued(
        self, q: Tensor, cache: LayerCache, slots: list[int], starts: list[int], scale: float
    ) -> Tensor:
        documents = cache.step.documents
        seen = [s + n for s, n in zip(starts, documents.lengths, strict=True)]
        held = [
            torch.cat([table[slot, :n] for slot, n in zip(slots, seen, strict=True)])
            for table in (cache.keys, cache.values)
        ]
        return _first(
            self.varlen(
                q,
                *held,
                cu_seqlens_q=documents.offsets,
                cu_seqlens_k=Documents.of(seen, q.device).offsets,
                max_seqlen_q=documents.longest,
                max_seqlen_k=max(seen),
                softmax_scale=scale,
                causal=True,
            )
        )


def _first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """flash-attn 3 (some builds) and 4 return (output, log-sum-exp)."""
    return out if isinstance(out, Tensor) else out[0]


def flash_version() -> int | None:
    """The flash-attn that half precision goes through on this machine's card."""
    flash = _flash()
    return None if flash is None else flash.version


@functools.cache
def _flash() -> _Flash | None:
    """The newest flash-attn that this machine's card runs; None where there is none."""

    def installed(name: str) -> bool:
        top = name.split(".")[0]
        return importlib.util.find_spec(top) is not None and (
            name == top or importlib.util.find_spec(name) is not None
        )

    major = torch.cuda.get_device_capability()[0]
    two = (
        importlib.import_module("flash_attn")
        if installed("flash_attn.flash_attn_interface")
        else None
    )
    cached = getattr(two, "flash_attn_with_kvcache", None)
    if major == 9 and installed("flash_attn_interface"):
        three = importlib.import_module("flash_attn_interface")
        return _Flash(3, three.flash_attn_varlen_func, three.flash_attn_with_kvcache)
    # flash-attn 2 ships an older `cute` folder too; without cutlass neither runs
    if major >= 9 and installed("flash_attn.cute") and installed("cutlass"):
        four = importlib.import_module("flash_attn.cute")
        return _Flash(4, four.flash_attn_varlen_func, cached)
    if two is not None and major >= 8:
        return _Flash(2, two.flash_attn_varlen_func, cached)
    return None
