"""A layer's attention between its projections: the kernels that were chosen, in any layers.

Letters: T tokens, D head_dim.
"""

from __future__ import annotations

import importlib
from typing import Literal

from torch import Tensor, nn

from megarlx.choices import unserved
from megarlx.model.attention import Kernel, attention
from megarlx.model.attention_form import AttentionForm
from megarlx.model.documents import Documents
from megarlx.model.kv_cache import LayerCache

# cudnn: through Transformer Engine; flash: flash-attn, or torch's; sdpa: torch's; blocks: plain
# torch, which serves everything; auto: the fastest of the last three that serves the layer.
AttentionKind = Literal["auto", "cudnn", "flash", "sdpa", "blocks"]


class CoreAttention(nn.Module):
    """q [T, heads of this rank, D] with k and v [T, kv_heads of this rank, D].

    Generation goes through the same function whatever was chosen, since it owns the cache.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        layer_number: int,
        form: AttentionForm,
        kind: AttentionKind,
    ) -> None:
        super().__init__()
        self.form, self.kind, self.attend = form, kind, attention
        if kind != "auto" and (why := unserved(kind, form.needs)):
            raise ValueError(f"attention of layer {layer_number - 1}, {form}: {why}")
        self.kernel: Kernel = "auto" if kind == "cudnn" else kind
        self.packed: nn.Module | None = None
        if kind == "cudnn":
            te = importlib.import_module("megarlx.model.attention_te")
            self.packed = te.CudnnAttention(
                heads, kv_heads, head_dim, layer_number=layer_number, scale=form.scale
            )

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, cache: LayerCache | None
    ) -> Tensor:
        if self.packed is not None and cache is None:
            out: Tensor = self.packed(q, k, v, documents)
            return out
        return self.attend(
            q, k, v, documents=documents, form=self.form, cache=cache, kernel=self.kernel
        )
