"""Causal attention over packed documents, with or without a cache: one function, several kernels.

The fastest that serves what is asked for is taken: flash-attn (CUDA in half precision), torch's
SDPA, plain torch by blocks of queries, which serves everything.

Letters: T tokens of all documents, H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megarlx.choices import Served, unserved
from megarlx.model.attention_blocks import BLOCKS
from megarlx.model.attention_flash import flash
from megarlx.model.attention_form import AttentionBackend, AttentionForm
from megarlx.model.attention_sdpa import SDPA
from megarlx.model.documents import Documents
from megarlx.model.kv_cache import LayerCache

# Of this function; cuDNN (attention_te.py) has no cache and stands beside it.
Kernel = Literal["auto", "flash", "sdpa", "blocks"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Documents,
    form: AttentionForm,
    cache: LayerCache | None = None,
    kernel: Kernel = "auto",
) -> Tensor:
    """q [T, H, D], k and v [T, K, D] to [T, H, D]; no token sees another document or its future.

    With a cache the new keys and values are written first, then document i sees its whole slot.
    flash, like auto, goes on to what is slower where flash-attn does not compute in this type.
    """
    if q.shape[0] != documents.tokens:
        raise ValueError(f"attention: q has {q.shape[0]} tokens, documents {documents.tokens}")
    needs = set(form.needs)
    if q.shape[1] != k.shape[1]:
        needs.add("grouped")
    behind = cache is not None and not cache.step.fresh
    if behind:
        needs.add("cached")
    backend = _backend(kernel, q, needs)
    if cache is not None:
        cache.write(k, v)
        if behind:
            if cache.step.one_each:
                return backend.decode(q, cache, form)
            return backend.continued(q, cache, form)
    return backend.packed(q, k, v, documents, form)


def decode_attention(
    q: Tensor, cache: LayerCache, form: AttentionForm, kernel: Kernel = "auto"
) -> Tensor:
    """One new token a slot, whose key and value are in the cache already."""
    needs: set[Served] = {*form.needs, "cached"}
    if q.shape[1] != cache.keys.shape[2]:
        needs.add("grouped")
    return _backend(kernel, q, needs).decode(q, cache, form)


def _backend(kernel: Kernel, q: Tensor, needs: set[Served]) -> AttentionBackend:
    half = q.dtype in (torch.float16, torch.bfloat16)
    fast = flash() if kernel in ("auto", "flash") and half and q.is_cuda else None
    of_kind: dict[Kernel, tuple[AttentionBackend, ...]] = {
        "auto": (SDPA, BLOCKS),
        "flash": (SDPA, BLOCKS),
        "sdpa": (SDPA,),
        "blocks": (BLOCKS,),
    }
    candidates = of_kind[kernel] if fast is None else (fast, *of_kind[kernel])
    for backend in candidates:
        if needs <= set(backend.serves if "cached" in needs else backend.serves_packed):
            return backend
    assert kernel == "sdpa"  # all others end in what serves everything
    raise ValueError(f"attention: {unserved(kernel, needs)}")
