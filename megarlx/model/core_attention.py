"""A layer's attention between its projections: the kernels that were chosen, in any layers.

Letters: T tokens, D head_dim.
"""

from __future__ import annotations

import importlib
from typing import Literal

from torch import Tensor, nn

from megarlx.model.attention import attention
from megarlx.model.documents import Documents
from megarlx.model.kv_cache import LayerCache

# cudnn: through Transformer Engine; flash: flash-attn; sdpa: torch's own; auto: flash-attn where it
# is installed and computes in this precision, else SDPA.
AttentionKind = Literal["auto", "cudnn", "flash", "sdpa"]


class CoreAttention(nn.Module):
    """q [T, heads of this rank, D] with k and v [T, kv_heads of this rank, D].

    Generation goes through the same function whatever was chosen, since it owns the cache.
    """

    def __init__(
        self, heads: int, kv_heads: int, head_dim: int, *, layer_number: int, kind: AttentionKind
    ) -> None:
        super().__init__()
        self.scale, self.kind = head_dim**-0.5, kind
        self.packed: nn.Module | None = None
        if kind == "cudnn":
            te = importlib.import_module("megarlx.model.attention_te")
            self.packed = te.CudnnAttention(heads, kv_heads, head_dim, layer_number=layer_number)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, cache: LayerCache | None
    ) -> Tensor:
        if self.packed is not None and cache is None:
            out: Tensor = self.packed(q, k, v, documents)
            return out
        return attention(
            q,
            k,
            v,
            documents=documents,
            scale=self.scale,
            cache=cache,
            use_flash=self.kind != "sdpa",
        )
