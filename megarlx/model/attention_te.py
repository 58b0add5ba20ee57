"""cuDNN's attention through Transformer Engine; for `attention = "cudnn"` alone.

Importing this file imports transformer_engine, so only `core_attention` does, when asked to.
"""

from __future__ import annotations

import os
from typing import ClassVar

import torch
import transformer_engine.pytorch as te
from torch import Tensor

from megarlx.choices import ONLY_CUDNN
from megarlx.model.documents import Documents, padded_length


class CudnnAttention(torch.nn.Module):
    """q [T, heads of this rank, head_dim] with k and v [T, kv_heads of this rank, head_dim]."""

    READ: ClassVar[tuple[str, ...]] = ()  # features.py

    def __init__(
        self, heads: int, kv_heads: int, head_dim: int, *, layer_number: int, scale: float
    ) -> None:
        super().__init__()
        os.environ.update(ONLY_CUDNN)
        # sizes are this rank's already, hence tp_size 1
        self.packed = te.DotProductAttention(
            heads,
            head_dim,
            num_gqa_groups=kv_heads,
            attention_dropout=0.0,
            qkv_format="thd",
            attn_mask_type="padding_causal",
            tp_size=1,
            layer_number=layer_number,
            softmax_scale=scale,
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        # cuDNN plans for each bound anew: a few of them serve all batches
        longest = min(padded_length(documents.longest), documents.tokens)
        out: Tensor = self.packed(
            q,
            k,
            v,
            cu_seqlens_q=documents.offsets,
            cu_seqlens_kv=documents.offsets,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        return out.view(q.shape)
