"""What a layer's attention computes, and what every kernel for it looks like.

Letters: T tokens, N documents, H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megarlx.choices import Served
from megarlx.model.documents import Documents
from megarlx.model.kv_cache import LayerCache

# When cached sequences are continued by several tokens: rows of a mask, and what its columns are a
# multiple of.
QUERY_BLOCK, SPAN = 128, 64


@dataclass(frozen=True)
class AttentionForm:
    """Scores are q k times `scale`, soft-capped; a token sees `window` tokens, its own included."""

    scale: float
    window: int | None = None
    cap: float | None = None

    @property
    def needs(self) -> frozenset[Served]:
        found: set[Served] = set()
        if self.window is not None:
            found.add("window")
        if self.cap is not None:
            found.add("cap")
        return frozenset(found)


class AttentionBackend(Protocol):
    """Kernels for q [T, H, D], k and v [T, K, D] to [T, H, D]; with a cache the new keys and values
    are in it already. What is not in `serves` is never asked for."""

    @property
    def serves(self) -> Collection[Served]:
        """With a cache."""

    @property
    def serves_packed(self) -> Collection[Served]:
        """Without one."""

    def packed(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, form: AttentionForm
    ) -> Tensor:
        """No token sees another document or its future."""

    def decode(self, q: Tensor, cache: LayerCache, form: AttentionForm) -> Tensor:
        """One new token a slot."""

    def continued(self, q: Tensor, cache: LayerCache, form: AttentionForm) -> Tensor:
        """Several new tokens behind what the slots already hold."""


class Continued(NamedTuple):
    """Blocks of new tokens behind what their slots hold, all of one shape: n of R rows."""

    places: Tensor  # [n · R] where the rows are in q
    rows: int  # R
    keys: Tensor  # [n, span, K, D]
    values: Tensor
    seen: Tensor  # [n] tokens before a block's first row


def continued_blocks(q: Tensor, cache: LayerCache) -> Iterator[Continued]:
    step, device = cache.step, q.device
    slots, starts = step.slots.tolist(), step.starts.tolist()
    for (rows, span), alike in _alike(starts, step.documents.lengths, cache).items():
        first = torch.tensor([place for _, place, _ in alike], device=device)
        held = torch.tensor([slots[document] for document, _, _ in alike], device=device)
        yield Continued(
            (first[:, None] + torch.arange(rows, device=device)).flatten(),
            rows,
            *cache.at(step.places_of(held, span)),
            torch.tensor([start for _, _, start in alike], device=device),
        )


def _alike(
    starts: list[int], lengths: Sequence[int], cache: LayerCache
) -> dict[tuple[int, int], list[tuple[int, int, int]]]:
    """(rows, span) -> blocks of (document, its first row in q, tokens before it). A block's span
    follows from its own document alone, so its neighbours in a call change none of its sums."""
    alike: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    begin, most = 0, cache.step.cache.table.longest
    for document, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        for row in range(0, length, QUERY_BLOCK):
            rows = min(QUERY_BLOCK, length - row)
            span = min(-(-(start + row + rows) // SPAN) * SPAN, most)
            alike.setdefault((rows, span), []).append((document, begin + row, start + row))
        begin += length
    return alike
