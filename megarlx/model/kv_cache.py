"""Keys and values of sequences being generated, in pages that slots share or have alone.

Letters: T new tokens of this call, N documents of this call, S slots, P pages of G places, n pages
of a slot, of either kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from megarlx.model.documents import Documents, padded_length

IDLE_PAGE = 0  # where rows of padding write, and padding behind a prompt


@dataclass(frozen=True)
class PageTable:
    """Where the tokens of every slot lie: the caches of all stages of a rank read one.

    A row is [first, n pages, n pages]: the slot's `first` tokens lie in pages that other slots may
    name too, what follows in pages of its own, from the beginning of the first of them. So samples
    share their prompt to its last token, and the border is the same in every batch.
    """

    rows: Tensor  # int32 [S, 1 + 2n]
    pages: int
    size: int
    shares: bool  # whether any slot has a first part

    @staticmethod
    def of_slots(slots: int, longest: int, device: torch.device | str = "cpu") -> PageTable:
        """Every slot is a page."""
        number = torch.arange(slots, dtype=torch.int32, device=device)
        rows = torch.stack((torch.zeros_like(number), number, number), 1)
        return PageTable(rows, slots, longest, False)

    @staticmethod
    def empty(
        slots: int,
        longest: int,
        *,
        size: int,
        shares: bool,
        tokens: int | None = None,
        device: torch.device | str = "cpu",
    ) -> PageTable:
        """Nobody holds a page; the last slot stays idle. `tokens`: how many the pages hold."""
        of_slot = -(-padded_length(longest) // size)
        pages = pages_of_slots(slots - 1, longest, size=size, shares=shares)
        pages = pages if tokens is None else -(-tokens // size)
        rows = torch.full((slots, 1 + 2 * of_slot), IDLE_PAGE, dtype=torch.int32, device=device)
        return PageTable(rows, 1 + pages, size, shares)

    @property
    def of_slot(self) -> int:
        return self.rows.shape[1] // 2

    @property
    def longest(self) -> int:
        """Tokens of a slot."""
        return self.of_slot * self.size

    def places(self, slots: Tensor, positions: Tensor) -> Tensor:
        """int64, of all P · G places, for slots and positions that broadcast."""
        first = self.rows[slots, 0]
        own = positions >= first
        inside = positions - own * first
        column = 1 + own * self.of_slot + torch.div(inside, self.size, rounding_mode="floor")
        return self.rows[slots, column].long() * self.size + inside % self.size


def shares_prompts(slots: int, on_cpu: bool) -> bool:
    """A CPU reads a prompt where it lies, whoever shares it. On a card a shared part is two
    launches a layer, which a slot alone has no use for."""
    return on_cpu or slots > 1


def pages_of_slots(slots: int, longest: int, *, size: int, shares: bool) -> int:
    """As many as so many sequences of the longest length fill. A prompt's last page is half full in
    the mean: small pages have one more a slot, so that nobody waits; large ones cost too much."""
    of_slot = -(-padded_length(longest) // size)
    return slots * (of_slot + (shares and size < 64))


@dataclass(frozen=True)
class KVCache:
    """One allocation for all layers of a stage."""

    keys: Tensor  # [layers, P, G, kv_heads, head_dim]
    values: Tensor
    table: PageTable

    @staticmethod
    def empty(
        layers: int, table: PageTable, kv_heads: int, head_dim: int, *, dtype: torch.dtype
    ) -> KVCache:
        shape = (layers, table.pages, table.size, kv_heads, head_dim)
        # zeros, not garbage: a masked place still enters a product, and 0·NaN is NaN
        keys, values = (torch.zeros(shape, dtype=dtype, device=table.rows.device) for _ in "kv")
        return KVCache(keys, values, table)


@dataclass(frozen=True)
class Parts:
    """What one new token a slot sees, in two parts: the pages that slots share, where neighbours
    that share the same are one document of several queries, and a slot's own pages."""

    offsets: Tensor  # int32 [N + 1] of those documents' queries; the last ones have none
    key_offsets: Tensor  # int32 [N + 1] of what they see, counted as if it lay in a row
    lengths: Tensor  # int32 [N] of the same
    nothing: Tensor  # bool [N], slots that share nothing; their first part does not count
    pages: Tensor  # int32 [N, n] of those documents
    own_lengths: Tensor  # int32 [N]
    own_pages: Tensor  # int32 [N, n]


@dataclass(frozen=True)
class CacheStep:
    """One forward over the cache: document i of the call continues slot `slots[i]`. `span` is an
    upper bound, known without asking the device, on any of these slots' lengths after the call.
    """

    cache: KVCache
    documents: Documents
    slots: Tensor  # int64 [N]
    starts: Tensor  # int64 [N], tokens the slots held before
    span: int
    fresh: bool = False  # every slot was empty: attention is that of the new tokens alone

    def __post_init__(self) -> None:
        longest = self.cache.table.longest
        if not 0 < self.span <= longest:
            raise ValueError(f"kv cache: span is {self.span}; allowed: 1 to {longest}, its length")

    @property
    def one_each(self) -> bool:
        """Decoding: every document is one new token."""
        return self.documents.longest == 1 and len(self.starts) == self.documents.tokens

    @cached_property
    def _where(self) -> tuple[Tensor, Tensor]:
        """(slot, position) of every new token."""
        if self.one_each:
            return self.slots, self.starts
        owner = self.documents.document_of_token
        return self.slots[owner], self.starts[owner] + self.documents.positions

    @property
    def positions(self) -> Tensor:
        return self._where[1]

    @cached_property
    def places(self) -> Tensor:
        """[T], where the new tokens go."""
        return self.cache.table.places(*self._where)

    @cached_property
    def seen(self) -> Tensor:
        """[N, span] places of the slots."""
        return self.places_of(self.slots, self.span)

    def places_of(self, slots: Tensor, span: int) -> Tensor:
        """[slots, span]"""
        return self.cache.table.places(slots[:, None], torch.arange(span, device=slots.device))

    @cached_property
    def parts(self) -> Parts:
        """Made on the device and of fixed shapes, so that a graph can hold it."""
        table, n = self.cache.table, len(self.slots)
        rows = table.rows[self.slots]
        first, shared, own = rows.split((1, table.of_slot, table.of_slot), 1)
        first, name = first[:, 0], shared[:, 0]  # no other prompt begins in that page
        begins = F.pad(name[1:] != name[:-1], (1, 0), value=True)
        number = torch.arange(1, n + 2, device=rows.device)
        offsets = torch.searchsorted(begins.cumsum(0), number, out_int32=True)
        leader = offsets[:-1].clamp(max=n - 1)
        # One place at least: flash-attn 2 writes the log-sum-exp of queries that see nothing where
        # another document's belongs, or behind them all.
        lengths = first[leader].clamp(min=1) * (offsets[1:] > offsets[:-1])
        return Parts(
            offsets,
            F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
            lengths,
            first == 0,
            shared[leader],
            (self.starts + 1 - first).int(),
            own,
        )

    @cached_property
    def visible(self) -> Tensor:
        """[N, 1, 1, span] for decoding: a token sees its slot up to and with itself."""
        span = torch.arange(self.span, device=self.starts.device)
        return (span <= self.starts[:, None])[:, None, None, :]

    def layer(self, index: int) -> LayerCache:
        return LayerCache(self, self.cache.keys[index], self.cache.values[index])


@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values [P, G, kv_heads, head_dim] in this step."""

    step: CacheStep
    keys: Tensor
    values: Tensor

    def write(self, k: Tensor, v: Tensor) -> None:
        for table, new in ((self.keys, k), (self.values, v)):
            table.flatten(0, 1).index_put_((self.step.places,), new)

    def at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of keys and values [*places, kv_heads, head_dim]."""
        return self.keys.flatten(0, 1)[places], self.values.flatten(0, 1)[places]
