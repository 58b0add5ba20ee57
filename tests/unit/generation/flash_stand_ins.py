"""flash-attn's functions over a cache in plain torch, for any type and device: what they are called
with, what they refuse and what they leave where there is nothing to see is as in flash-attn 2."""

from __future__ import annotations

import torch
from torch import Tensor

from megarlx.model.attention_flash import CachedTwo, Flash


def _attended(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """[n, H, D] over [m, K, D], and the log-sum-exp [n, H]; a row's bits depend on no other row."""
    if not len(k):
        return torch.zeros_like(q), q.new_full(q.shape[:2], torch.inf)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    rows = []
    for row in q:
        scores = (row[None] * k).sum(-1).mul(scale)  # [m, H]
        lse = scores.logsumexp(0)
        rows.append((((scores - lse).exp()[..., None] * v).sum(0), lse))
    return torch.stack([out for out, _ in rows]), torch.stack([lse for _, lse in rows])


class Stand:
    """`read` counts the places of pages that were read, once for all queries of a document."""

    def __init__(self, page_grain: int = 1) -> None:
        self.page_grain = page_grain
        self.read = {"shared": 0, "own": 0}
        self.splits: set[int] = set()

    def _check(self, k: Tensor, *small: Tensor) -> None:
        assert k.shape[1] % self.page_grain == 0
        assert all(t.dtype == torch.int32 and t.stride(-1) == 1 for t in small)

    def varlen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        block_table: Tensor,
        softmax_scale: float,
        return_attn_probs: bool,
    ) -> tuple[Tensor, Tensor, None]:
        self._check(k, cu_seqlens_q, cu_seqlens_k, block_table)
        assert return_attn_probs
        assert int(cu_seqlens_q[-1]) == len(q)
        out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], torch.nan)
        for document, pages in enumerate(block_table.tolist()):
            rows = slice(*cu_seqlens_q[document : document + 2].tolist())
            begin, end = cu_seqlens_k[document : document + 2].tolist()
            if rows.start == rows.stop:
                continue
            assert rows.stop - rows.start <= max_seqlen_q
            assert end - begin <= max_seqlen_k
            # flash-attn 2 writes such a document's log-sum-exp where another's belongs
            assert end > begin
            held = (t[pages].flatten(0, 1)[: end - begin] for t in (k, v))
            out[rows], lse[rows] = _attended(q[rows], *held, softmax_scale)
            self.read["shared"] += end - begin
        return out, lse.t().contiguous(), None

    def with_cache(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cache_seqlens: Tensor,
        block_table: Tensor,
        softmax_scale: float,
        num_splits: int,
        return_softmax_lse: bool,
    ) -> tuple[Tensor, Tensor]:
        self._check(k, cache_seqlens, block_table)
        assert return_softmax_lse
        self.splits.add(num_splits)
        out, lse = torch.zeros_like(q), q.new_zeros(len(q), q.shape[2], 1)
        for row, (pages, length) in enumerate(
            zip(block_table.tolist(), cache_seqlens.tolist(), strict=True)
        ):
            held = (t[pages].flatten(0, 1)[:length] for t in (k, v))
            out[row], found = _attended(q[row], *held, softmax_scale)
            lse[row, :, 0] = found[0]
            self.read["own"] += length
        return out, lse

    @property
    def flash(self) -> Flash:
        return Flash(2, self.varlen, CachedTwo(self.with_cache, self.varlen))
