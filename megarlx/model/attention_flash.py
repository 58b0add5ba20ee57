"""flash-attn 2, 3 or 4 behind one interface: CUDA in half precision.

Its causal mask is aligned to the bottom right corner, SDPA's to the top left one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megarlx.choices import SERVES
from megarlx.model.attention_form import AttentionForm
from megarlx.model.attention_sdpa import SDPA
from megarlx.model.documents import Documents
from megarlx.model.kv_cache import LayerCache


@dataclass(frozen=True)
class Flash:
    """An installed flash-attn: its packed function, and the one that reads a cache if it has it."""

    version: int
    varlen: Callable[..., Tensor | tuple[Tensor, ...]]
    with_cache: Callable[..., Tensor | tuple[Tensor, ...]] | None
    serves = SERVES["flash"]

    def packed(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, form: AttentionForm
    ) -> Tensor:
        return _first(
            self.varlen(
                q,
                k,
                v,
                cu_seqlens_q=documents.offsets,
                cu_seqlens_k=documents.offsets,
                max_seqlen_q=documents.longest,
                max_seqlen_k=documents.longest,
                softmax_scale=form.scale,
                causal=True,
            )
        )

    def decode(self, q: Tensor, cache: LayerCache, form: AttentionForm) -> Tensor:
        step = cache.step
        if self.with_cache is None:
            return SDPA.decode(q, cache, form)
        slots, lengths = step.as_int32
        tables, index = (cache.keys, cache.values), None
        if isinstance(step.slots, slice):
            tables = (cache.keys[step.slots], cache.values[step.slots])
        else:
            index = slots
        out = self.with_cache(
            q.unsqueeze(1),
            *tables,
            cache_seqlens=lengths,
            cache_batch_idx=index,
            softmax_scale=form.scale,
            causal=True,
        )
        return _first(out).squeeze(1)

    def continued(self, q: Tensor, cache: LayerCache, form: AttentionForm) -> Tensor:
        documents = cache.step.documents
        slots, starts = cache.step.slot_index.tolist(), cache.step.starts.tolist()
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
                softmax_scale=form.scale,
                causal=True,
            )
        )


def _first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """flash-attn 3 (some builds) and 4 return (output, log-sum-exp)."""
    return out if isinstance(out, Tensor) else out[0]


def flash_version() -> int | None:
    """The flash-attn that half precision goes through on this machine's card."""
    found = flash()
    return None if found is None else found.version


@functools.cache
def flash() -> Flash | None:
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
        return Flash(3, three.flash_attn_varlen_func, three.flash_attn_with_kvcache)
    # flash-attn 2 ships an older `cute` folder too; without cutlass neither runs
    if major >= 9 and installed("flash_attn.cute") and installed("cutlass"):
        four = importlib.import_module("flash_attn.cute")
        return Flash(4, four.flash_attn_varlen_func, cached)
    if two is not None and major >= 8:
        return Flash(2, two.flash_attn_varlen_func, cached)
    return None
