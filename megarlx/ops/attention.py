"""Causal attention over packed documents in fp32 on a CPU, forward and backward.

A document's keys and values are packed once for all its queries, and the scores of some queries
are all there is of the square. What a token's result is made of follows from the tokens before it
in its own document: not from how long that is, its neighbours, or the number of threads.

Letters: T tokens of all documents, H query heads, K key/value heads, D head_dim, N documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megarlx.ops import native

native.load()


def packed_attention(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """q [T, H, D], k and v [T, K, D] to [T, H, D]; document i is the tokens from offsets[i] up to
    offsets[i + 1], int32 [N + 1]."""
    out: Tensor = torch.ops.megarlx.packed_attention(q, k, v, offsets, scale)[0]
    return out


@torch.library.register_fake("megarlx::packed_attention")
def _(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2])


@torch.library.register_fake("megarlx::packed_attention_backward")
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
