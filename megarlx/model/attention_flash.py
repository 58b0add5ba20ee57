"""flash-attn 2, 3 or 4, or torch's own, behind one interface: CUDA in half precision.

Its causal mask is aligned to the bottom right corner, SDPA's to the top left one.

A new token sees two parts: what slots share, read once for all neighbours that share it, and its
own. Each part's sums depend on the slot alone: the border lies where the prompt ends, and the own
part is cut into as many splits in every batch (flash-attn left alone chooses them by the batch).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from megarlx.choices import FLASH_LACKS, SERVES, Served, flash_of
from megarlx.model.attention_form import AttentionForm
from megarlx.model.attention_sdpa import SDPA
from megarlx.model.documents import Documents
from megarlx.model.kv_cache import LayerCache
from megarlx.ops.decode_parts import merge_attention

SPLIT = 1024  # tokens for which a split more pays


@dataclass(frozen=True)
class Cached(ABC):
    """Attention of one new token a slot over one part of what it sees, with the log-sum-exp of its
    scores: [N, H, D] and [N, H]."""

    pages: ClassVar[str]  # how a table of pages is called
    with_cache: Callable[..., tuple[Tensor, ...]]

    @abstractmethod
    def shared(self, q: Tensor, cache: LayerCache, form: AttentionForm) -> tuple[Tensor, Tensor]:
        """Of neighbours that share it, as one document of several queries."""

    def own(self, q: Tensor, cache: LayerCache, form: AttentionForm) -> tuple[Tensor, Tensor]:
        parts = cache.step.parts
        out, lse, *_ = self.with_cache(
            q.unsqueeze(1),
            cache.keys,
            cache.values,
            cache_seqlens=parts.own_lengths,
            softmax_scale=form.scale,
            # By what a slot may hold, never by the batch.
            num_splits=-(-cache.step.cache.table.longest // SPLIT),
            return_softmax_lse=True,
            **{self.pages: parts.own_pages},
        )
        return out.squeeze(1), lse.squeeze(2)


@dataclass(frozen=True)
class CachedTwo(Cached):
    """flash-attn 2: its packed function reads pages, of 256 places or a multiple."""

    pages = "block_table"
    varlen: Callable[..., tuple[Tensor, ...]]

    def shared(self, q: Tensor, cache: LayerCache, form: AttentionForm) -> tuple[Tensor, Tensor]:
        parts = cache.step.parts
        out, lse, *_ = self.varlen(
            q,
            cache.keys,
            cache.values,
            cu_seqlens_q=parts.offsets,
            cu_seqlens_k=parts.key_offsets,
            max_seqlen_q=len(q),
            max_seqlen_k=cache.step.cache.table.longest,
            block_table=parts.pages,
            softmax_scale=form.scale,
            return_attn_probs=True,
        )
        return out, lse.t()


@dataclass(frozen=True)
class CachedThree(Cached):
    """flash-attn 3: one function for both."""

    pages = "page_table"

    def shared(self, q: Tensor, cache: LayerCache, form: AttentionForm) -> tuple[Tensor, Tensor]:
        parts = cache.step.parts
        out, lse, *_ = self.with_cache(
            q,
            cache.keys,
            cache.values,
            cu_seqlens_q=parts.offsets,
            max_seqlen_q=len(q),
            cache_seqlens=parts.lengths,
            page_table=parts.pages,
            softmax_scale=form.scale,
            num_splits=1,
            return_softmax_lse=True,
        )
        return out, lse.t()


@dataclass(frozen=True)
class Flash:
    """An installed flash-attn: its packed function, and what reads a cache if it has it."""

    version: int | str
    varlen: Callable[..., Tensor | tuple[Tensor, ...]]
    cached: Cached | None

    @property
    def serves_packed(self) -> tuple[Served, ...]:
        lacks = FLASH_LACKS.get(str(self.version), ())
        return tuple(one for one in SERVES["flash"] if one not in lacks)

    @property
    def serves(self) -> tuple[Served, ...]:
        """The parts of a cache know no window."""
        return tuple(one for one in self.serves_packed if one not in ("window", "cap"))

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
                **_limits(form),
            )
        )

    def decode(self, q: Tensor, cache: LayerCache, form: AttentionForm) -> Tensor:
        if self.cached is None:
            return SDPA.decode(q, cache, form)
        own, lse = self.cached.own(q, cache, form)
        if not cache.step.cache.table.shares:
            return own
        shared, shared_lse = self.cached.shared(q, cache, form)
        shared_lse = shared_lse.masked_fill(cache.step.parts.nothing[:, None], -torch.inf)
        return merge_attention(shared, shared_lse, own, lse)[0]

    def continued(self, q: Tensor, cache: LayerCache, form: AttentionForm) -> Tensor:
        step, documents = cache.step, cache.step.documents
        seen = [s + n for s, n in zip(step.starts.tolist(), documents.lengths, strict=True)]
        slots = step.slots.tolist()
        places = [
            step.places_of(torch.tensor([slot], device=q.device), n)[0]
            for slot, n in zip(slots, seen, strict=True)
        ]
        held = cache.at(torch.cat(places))
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


def _limits(form: AttentionForm) -> dict[str, Any]:
    """A window counts the tokens before a token, not itself. Only what is asked for is named: old
    versions have no soft-caps, and say "no window" in other ways."""
    found: dict[str, Any] = {}
    if form.window is not None:
        found["window_size"] = (form.window - 1, 0)
    if form.cap is not None:
        found["softcap"] = form.cap
    return found


def _first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """flash-attn 3 (some builds) and 4 return (output, log-sum-exp)."""
    return out if isinstance(out, Tensor) else out[0]


def varlen_of_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: Literal[True],
    window_size: tuple[int, int] = (-1, 0),  # all before a token, nothing behind it
) -> Tensor:
    """torch's packed function in flash-attn's words."""
    attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    out: Tensor = attend(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        scale=softmax_scale,
        window_size=window_size,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out


def flash_version() -> int | str | None:
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
    cached: Cached | None = None
    if two is not None and hasattr(two, "flash_attn_with_kvcache"):
        cached = CachedTwo(two.flash_attn_with_kvcache, two.flash_attn_varlen_func)
    if major == 9 and installed("flash_attn_interface"):
        three = importlib.import_module("flash_attn_interface")
        return Flash(3, three.flash_attn_varlen_func, CachedThree(three.flash_attn_with_kvcache))
    # flash-attn 2 ships an older `cute` folder too; without cutlass neither runs
    if major >= 9 and installed("flash_attn.cute") and installed("cutlass"):
        four = importlib.import_module("flash_attn.cute")
        return Flash(4, four.flash_attn_varlen_func, cached)
    if two is not None and major >= 8:
        return Flash(2, two.flash_attn_varlen_func, cached)
    of_torch = flash_of(torch.__version__)
    return Flash(of_torch, varlen_of_torch, None) if of_torch and major >= 8 else None
