"""Attention by torch's SDPA, which never gets a mask of the whole square: documents go through it
in buckets of equal length. In fp32 on a CPU an op of ours is faster, and takes them as they are.

Its causal mask is aligned to the top left corner, so cached attention has masks of its own.

Letters: T tokens, H query heads, K key/value heads, D head_dim, L a bucket's length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megarlx.choices import SERVES
from megarlx.model.attention_form import AttentionForm, continued_blocks
from megarlx.model.documents import Documents, from_buckets, to_buckets
from megarlx.model.kv_cache import LayerCache
from megarlx.ops.attention import packed_attention
from megarlx.ops.product import is_own


class _Sdpa:
    serves = serves_packed = SERVES["sdpa"]

    def packed(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, form: AttentionForm
    ) -> Tensor:
        shape = documents.equal  # refuses documents that are none
        if is_own(q):
            return packed_attention(q, k, v, documents.offsets, form.scale)
        if shape is not None:
            q, k, v = (x.unflatten(0, shape) for x in (q, k, v))
            return _causal(q, k, v, form.scale).flatten(0, 1)
        buckets = documents.buckets
        parts = zip(*(to_buckets(x, buckets) for x in (q, k, v)), strict=True)
        return from_buckets([_causal(q, k, v, form.scale) for q, k, v in parts], buckets)

    def decode(self, q: Tensor, cache: LayerCache, form: AttentionForm) -> Tensor:
        """The query heads that share a key head are its rows, so no key is repeated."""
        step, (n, heads, dim) = cache.step, q.shape
        keys, values = (t.transpose(1, 2) for t in cache.at(step.seen))
        rows = q.view(n, keys.shape[1], heads // keys.shape[1], dim)
        mask = step.visible.expand(n, 1, rows.shape[2], step.span)
        return F.scaled_dot_product_attention(
            rows, keys, values, attn_mask=mask, scale=form.scale
        ).reshape(q.shape)

    def continued(self, q: Tensor, cache: LayerCache, form: AttentionForm) -> Tensor:
        """The mask is bottom-right aligned."""
        out = torch.empty_like(q)
        for block in continued_blocks(q, cache):
            keys, values = block.keys.transpose(1, 2), block.values.transpose(1, 2)
            # the last place that a row sees
            last = block.seen[:, None] + torch.arange(block.rows, device=q.device)
            out[block.places] = (
                F.scaled_dot_product_attention(
                    q[block.places].unflatten(0, (-1, block.rows)).transpose(1, 2),
                    keys,
                    values,
                    attn_mask=torch.arange(keys.shape[2], device=q.device)
                    <= last[:, None, :, None],
                    scale=form.scale,
                    enable_gqa=q.shape[1] != keys.shape[1],
                )
                .transpose(1, 2)
                .flatten(0, 1)
            )
        return out


SDPA = _Sdpa()


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[documents, L, heads, D], all documents of one length."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)
