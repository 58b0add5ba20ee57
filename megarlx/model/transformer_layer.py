"""One layer of the transformer: attention, MLP and their norms.

Letters: T tokens one after another, H query heads and K key/value heads of this rank, D head_dim.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megarlx.comm import collectives
from megarlx.config.model import ModelConfig
from megarlx.model import rope
from megarlx.model.core_attention import AttentionKind, CoreAttention
from megarlx.model.documents import Documents
from megarlx.model.kv_cache import LayerCache
from megarlx.model.metadata import kv_copies, local_kv_heads
from megarlx.ops.elementwise import attention_heads, is_native, swiglu

# none: keep every activation. full: keep a layer's input and run the layer again in backward.
# selective: run again only what has no weight matrix: QK-norm, rotation and attention from the
# fused projection, and SwiGLU from gate and up; they are many bytes and few operations.
Recompute = Literal["none", "selective", "full"]

Rotation = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Fused projection, QK-norm, rotation, attention over documents, output projection."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        backend: Any,
        options: dict[str, Any],
        recompute: Recompute,
        kind: AttentionKind,
    ) -> None:
        super().__init__()
        self.config, self.group = config, options["group"]
        self.recompute = backend.recompute if recompute == "selective" else None
        tp = self.group.size
        self.heads, self.kv_heads = config.heads // tp, local_kv_heads(config, tp)
        dim = config.head_dim
        self.qkv = backend.ColumnLinear(
            config.hidden_size,
            (self.heads + 2 * self.kv_heads) * tp * dim,
            bias=config.qkv_bias,
            **options,
        )
        self.o = backend.RowLinear(config.heads * dim, config.hidden_size, **options)
        self.core = CoreAttention(self.heads, self.kv_heads, dim, layer_number=index + 1, kind=kind)
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            norm = {
                "eps": config.norm_eps,
                "sequence_parallel": False,
                "dtype": options["dtype"],
                "device": options["device"],
            }
            self.q_norm = backend.RMSNorm(self.heads * dim if full else dim, **norm)
            self.k_norm = backend.RMSNorm(self.kv_heads * dim if full else dim, **norm)

    def forward(
        self, x: Tensor, rotation: Rotation, documents: Documents, cache: LayerCache | None
    ) -> Tensor:
        qkv = self.qkv(x)
        if self.recompute is not None and torch.is_grad_enabled():
            attended = self.recompute(self._attend, qkv, rotation, documents, cache)
        else:
            attended = self._attend(qkv, rotation, documents, cache)
        out: Tensor = self.o(attended)
        return out

    def _attend(
        self, qkv: Tensor, rotation: Rotation, documents: Documents, cache: LayerCache | None
    ) -> Tensor:
        dim = self.config.head_dim
        qk_heads = self.heads + self.kv_heads
        spans_ranks = self.config.qk_norm == "full" and self.group.size > 1
        if is_native(qkv) and (qkv.is_cuda or not spans_ranks):
            over = self.group if spans_ranks else None
            q, k, v = attention_heads(
                qkv, *rotation, self.heads, self.kv_heads, **self._norm_weights(), group=over
            )
        elif self.config.qk_norm == "none":
            qk, v = qkv.view(len(qkv), -1, dim).split((qk_heads, self.kv_heads), dim=1)
            q, k = rope.rotate(qk, *rotation).split((self.heads, self.kv_heads), dim=1)
        else:
            widths = (self.heads * dim, self.kv_heads * dim, self.kv_heads * dim)
            q, k, v = qkv.split(widths, dim=1)
            q, k = self._normalise(q, k)
            q = rope.rotate(q.view(len(q), -1, dim), *rotation)
            k = rope.rotate(k.view(len(k), -1, dim), *rotation)
            v = v.unflatten(1, (-1, dim))
        out: Tensor = self.core(q, k, v, documents, cache)
        return out.flatten(1)

    def _norm_weights(self) -> dict[str, Any]:
        if self.config.qk_norm == "none":
            return {}
        weights = {"q_weight": self.q_norm.weight, "k_weight": self.k_norm.weight}
        return weights | {"eps": self.config.norm_eps}

    def _normalise(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.qk_norm == "per_head":
            dim = self.config.head_dim
            return self.q_norm(q.unflatten(1, (-1, dim))), self.k_norm(k.unflatten(1, (-1, dim)))
        if self.group.size == 1:
            return self.q_norm(q), self.k_norm(k)
        # the norm spans the heads of all ranks: both sums of squares in one reduction. Every
        # rank's output depends on them, so their gradient is summed over the ranks as well
        wide_q, wide_k = (x if x.dtype == torch.float64 else x.float() for x in (q, k))
        sums = torch.stack((wide_q.square().sum(1), wide_k.square().sum(1)), dim=1)
        sums = collectives.copy_to_group(
            collectives.reduce_from_group(sums, self.group), self.group
        )
        config = self.config
        counted = config.kv_heads * kv_copies(config, self.group.size)  # copies were summed too
        inverse_q = (sums[:, :1] / (config.heads * config.head_dim) + config.norm_eps).rsqrt()
        inverse_k = (sums[:, 1:] / (counted * config.head_dim) + config.norm_eps).rsqrt()
        q = (wide_q * inverse_q * self.q_norm.weight).to(q.dtype)
        return q, (wide_k * inverse_k * self.k_norm.weight).to(k.dtype)


class MLP(nn.Module):
    """SwiGLU between a fused gate and up projection and the projection down."""

    def __init__(
        self, config: ModelConfig, backend: Any, options: dict[str, Any], recompute: Recompute
    ) -> None:
        super().__init__()
        self.recompute = recompute == "selective"
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up = backend.ColumnLinear(hidden, 2 * inner, bias=False, **options)
        self.down = backend.RowLinear(inner, hidden, **options)

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)
        inner = swiglu(gate_up)
        again = self.recompute and torch.is_grad_enabled()
        with _made_again(inner, gate_up) if again else nullcontext():
            out: Tensor = self.down(inner)
        return out


def _made_again(inner: Tensor, gate_up: Tensor) -> AbstractContextManager[None]:
    """Whoever keeps `inner` for backward keeps gate and up in its place, which are kept anyway.

    A checkpoint around `swiglu` would save nothing: it is the projection down that keeps its input.
    """
    source, place, shape = gate_up.detach(), inner.data_ptr(), inner.shape

    def pack(saved: Tensor) -> Tensor | None:
        return None if saved.data_ptr() == place and saved.shape == shape else saved

    def unpack(kept: Tensor | None) -> Tensor:
        return swiglu(source) if kept is None else kept

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class Layer(nn.Module):
    """Attention and MLP, each with its norm before it (pre) or behind it (post, OLMo2)."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        backend: Any,
        options: dict[str, Any],
        recompute: Recompute,
        attention: AttentionKind,
    ) -> None:
        super().__init__()
        self.post = config.norm_position == "post"
        norm = {"eps": config.norm_eps}
        norm |= {key: options[key] for key in ("sequence_parallel", "dtype", "device")}
        self.attention = Attention(config, index, backend, options, recompute, attention)
        self.mlp = MLP(config, backend, options, recompute)
        self.attention_norm = backend.RMSNorm(config.hidden_size, **norm)
        self.mlp_norm = backend.RMSNorm(config.hidden_size, **norm)

    def forward(
        self, x: Tensor, rotation: Rotation, documents: Documents, cache: LayerCache | None
    ) -> Tensor:
        if self.post:
            attended = self.attention(x, rotation, documents, cache)
            x = self.attention_norm(attended, residual=x)
            out: Tensor = self.mlp_norm(self.mlp(x), residual=x)
            return out
        x = x + self.attention(self.attention_norm(x), rotation, documents, cache)
        return x + self.mlp(self.mlp_norm(x))
