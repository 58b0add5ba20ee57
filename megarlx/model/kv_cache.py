"""Keys and values of sequences being generated, in slots that are filled and freed one by one.

Letters: T new tokens of this call, N documents of this call, S slots, M the longest sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megarlx.model.documents import Documents


@dataclass(frozen=True)
class KVCache:
    """One allocation for all layers of a stage; `lengths` says how much of each slot is filled."""

    keys: Tensor  # [layers, S, M, kv_heads, head_dim]
    values: Tensor
    lengths: Tensor  # int64 [S]

    @staticmethod
    def empty(
        layers: int,
        slots: int,
        longest: int,
        kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> KVCache:
        shape = (layers, slots, longest, kv_heads, head_dim)
        # zeros, not garbage: a masked place still enters a product, and 0·NaN is NaN
        return KVCache(
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(slots, dtype=torch.int64, device=device),
        )

    def copy_slot_(self, source: int, targets: Tensor, length: int) -> None:
        """Give a prompt computed once to every sequence of its group."""
        for table in (self.keys, self.values):
            table[:, targets, :length] = table[:, source : source + 1, :length]
        self.lengths[targets] = length


@dataclass(frozen=True)
class CacheStep:
    """One forward over the cache: document i of the call continues slot `slots[i]`.

    The caller advances `cache.lengths` when every layer has run. `span` is an upper bound, known
    without asking the device, on any of these slots' lengths after the call. A slice in place of
    a tensor of slots lets attention read the cache where it lies.
    """

    cache: KVCache
    documents: Documents
    slots: Tensor | slice
    starts: Tensor  # int64 [N], tokens the slots held before
    span: int
    fresh: bool = False  # every slot was empty: attention is that of the new tokens alone

    def __post_init__(self) -> None:
        longest = self.cache.keys.shape[2]
        if not 0 < self.span <= longest:
            raise ValueError(f"kv cache: span is {self.span}; allowed: 1 to {longest}, its length")

    @property
    def one_each(self) -> bool:
        """Decoding: every document is one new token."""
        return self.documents.longest == 1 and len(self.starts) == self.documents.tokens

    @cached_property
    def slot_index(self) -> Tensor:
        if isinstance(self.slots, Tensor):
            return self.slots
        everything = torch.arange(self.cache.keys.shape[1], device=self.starts.device)
        return everything[self.slots]

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """(slot, position) of every new token."""
        if self.one_each:
            return self.slot_index, self.starts
        owner = self.documents.document_of_token
        return self.slot_index[owner], self.starts[owner] + self.documents.positions

    @property
    def positions(self) -> Tensor:
        return self.places[1]

    @cached_property
    def as_int32(self) -> tuple[Tensor, Tensor]:
        """(slots, tokens that each holds with the new one), for kernels that take nothing wider."""
        return self.slot_index.int(), (self.starts + 1).int()

    @cached_property
    def visible(self) -> Tensor:
        """[N, 1, 1, span] for decoding: a token sees its slot up to and with itself."""
        span = torch.arange(self.span, device=self.starts.device)
        return (span <= self.starts[:, None])[:, None, None, :]

    def layer(self, index: int) -> LayerCache:
        return LayerCache(self, self.cache.keys[index], self.cache.values[index])


@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values [S, M, kv_heads, head_dim] in this step."""

    step: CacheStep
    keys: Tensor
    values: Tensor

    def write(self, k: Tensor, v: Tensor) -> None:
        self.keys.index_put_(self.step.places, k)
        self.values.index_put_(self.step.places, v)
