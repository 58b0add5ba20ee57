"""One layer of the transformer: attention, MLP and their norms.

Letters: T tokens one after another, H query heads and K key/value heads of this rank, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megarlx.comm import differentiable
from megarlx.config.model import ModelConfig
from megarlx.model import rope
from megarlx.model.attention_form import AttentionForm
from megarlx.model.core_attention import AttentionKind, CoreAttention
from megarlx.model.documents import Documents
from megarlx.model.kv_cache import LayerCache
from megarlx.model.layers_torch import RMSNorm
from megarlx.ops.elementwise import attention_heads, geglu, is_native, swiglu

# none: keep every activation. full: keep a layer's input and run the layer again in backward.
# selective: run again only what has no weight matrix: QK-norm, rotation and attention from the
# fused projection, and SwiGLU from gate and up; they are many bytes and few operations.
Recompute = Literal["none", "selective", "full"]

# What a module computes with stands in its attributes, and is called through them: features.py
# reads there what the faster decoders, planning and conversion have to know.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": swiglu, "gelu_tanh": geglu}


def _norm(config: ModelConfig, options: dict[str, Any], sequence_parallel: bool) -> dict[str, Any]:
    """How every norm of the model is made."""
    return {
        "eps": config.norm_eps,
        "plus_one": config.norm_plus_one,
        "sequence_parallel": sequence_parallel,
        "dtype": options["dtype"],
        "device": options["device"],
    }


def _is_plain(norm: nn.Module) -> bool:
    """Whether it is RMSNorm of one of the two backends and not made of it."""
    of = type(norm)  # by name: importing layers_te imports Transformer Engine
    return (
        of is RMSNorm or f"{of.__module__}.{of.__qualname__}" == "megarlx.model.layers_te.RMSNorm"
    )


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
        self.group = options["group"]
        self.recompute = backend.recompute if recompute == "selective" else None
        tp = self.group.size
        self.heads, self.kv_heads = config.heads // tp, config.local_kv_heads(tp)
        self.head_dim = dim = config.head_dim
        self.qk_norm, self.spans_ranks = config.qk_norm, config.qk_norm == "full" and tp > 1
        self.rotate = rope.rotate
        self.qkv = backend.ColumnLinear(
            config.hidden_size,
            (self.heads + 2 * self.kv_heads) * tp * dim,
            bias=config.qkv_bias,
            **options,
        )
        self.o = backend.RowLinear(config.heads * dim, config.hidden_size, **options)
        form = AttentionForm(
            config.query_scalar**-0.5, config.window_of(index), config.attention_cap or None
        )
        self.core = CoreAttention(
            self.heads, self.kv_heads, dim, layer_number=index + 1, form=form, kind=kind
        )
        if config.qk_norm != "none":
            full, norm = config.qk_norm == "full", _norm(config, options, False)
            self.q_norm = backend.RMSNorm(self.heads * dim if full else dim, **norm)
            self.k_norm = backend.RMSNorm(self.kv_heads * dim if full else dim, **norm)
        # of queries and keys: numbers of all ranks that a norm over the projection counts
        self.spanned = (config.heads * dim, config.kv_heads * config.kv_copies(tp) * dim)

    def forward(
        self, x: Tensor, rotation: rope.Rotation, documents: Documents, cache: LayerCache | None
    ) -> Tensor:
        qkv = self.qkv(x)
        if self.recompute is not None and torch.is_grad_enabled():
            attended = self.recompute(self._attend, qkv, rotation, documents, cache)
        else:
            attended = self._attend(qkv, rotation, documents, cache)
        out: Tensor = self.o(attended)
        return out

    def _attend(
        self, qkv: Tensor, rotation: rope.Rotation, documents: Documents, cache: LayerCache | None
    ) -> Tensor:
        dim = self.head_dim
        qk_heads = self.heads + self.kv_heads
        if is_native(qkv) and self._in_one_op(qkv):
            over = self.group if self.spans_ranks else None
            q, k, v = attention_heads(
                qkv, *rotation, self.heads, self.kv_heads, **self._norm_weights(), group=over
            )
        elif self.qk_norm == "none":
            qk, v = qkv.view(len(qkv), -1, dim).split((qk_heads, self.kv_heads), dim=1)
            q, k = self.rotate(qk, *rotation).split((self.heads, self.kv_heads), dim=1)
        else:
            widths = (self.heads * dim, self.kv_heads * dim, self.kv_heads * dim)
            q, k, v = qkv.split(widths, dim=1)
            q, k = self._normalise(q, k)
            q = self.rotate(q.view(len(q), -1, dim), *rotation)
            k = self.rotate(k.view(len(k), -1, dim), *rotation)
            v = v.unflatten(1, (-1, dim))
        out: Tensor = self.core(q, k, v, documents, cache)
        return out.flatten(1)

    def _in_one_op(self, qkv: Tensor) -> bool:
        """Whether norms and rotation are those that `attention_heads` has."""
        if self.rotate is not rope.rotate or (self.spans_ranks and not qkv.is_cuda):
            return False
        if self.qk_norm == "none":
            return True
        norms = (self.q_norm, self.k_norm)
        # 1 + weight of a bf16 weight is in fp32, which the op does not take beside bf16
        return all(_is_plain(norm) and norm.scale.dtype == qkv.dtype for norm in norms)

    def _norm_weights(self) -> dict[str, Any]:
        if self.qk_norm == "none":
            return {}
        return {
            "q_weight": self.q_norm.scale,
            "k_weight": self.k_norm.scale,
            "eps": self.q_norm.eps,
        }

    def _normalise(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.qk_norm == "per_head":
            dim = self.head_dim
            return self.q_norm(q.unflatten(1, (-1, dim))), self.k_norm(k.unflatten(1, (-1, dim)))
        if not self.spans_ranks:
            return self.q_norm(q), self.k_norm(k)
        # the norm spans the heads of all ranks: both sums of squares in one reduction. Every
        # rank's output depends on them, so their gradient is summed over the ranks as well
        wide_q, wide_k = (x if x.dtype == torch.float64 else x.float() for x in (q, k))
        sums = torch.stack((wide_q.square().sum(1), wide_k.square().sum(1)), dim=1)
        sums = differentiable.copy_to_group(
            differentiable.reduce_from_group(sums, self.group), self.group
        )
        of_q, of_k = self.spanned  # copies were summed too
        q = self.q_norm.given_mean_square(wide_q, sums[:, :1] / of_q).to(q.dtype)
        return q, self.k_norm.given_mean_square(wide_k, sums[:, 1:] / of_k).to(k.dtype)


class MLP(nn.Module):
    """A gated activation between a fused gate and up projection and the projection down."""

    def __init__(
        self, config: ModelConfig, backend: Any, options: dict[str, Any], recompute: Recompute
    ) -> None:
        super().__init__()
        self.recompute = recompute == "selective"
        self.activation = ACTIVATIONS[config.activation]
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up = backend.ColumnLinear(hidden, 2 * inner, bias=False, **options)
        self.down = backend.RowLinear(inner, hidden, **options)

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)
        inner = self.activation(gate_up)
        again = self.recompute and torch.is_grad_enabled()
        with _made_again(self.activation, inner, gate_up) if again else nullcontext():
            out: Tensor = self.down(inner)
        return out


def _made_again(
    activation: Callable[[Tensor], Tensor], inner: Tensor, gate_up: Tensor
) -> AbstractContextManager[None]:
    """Whoever keeps `inner` for backward keeps gate and up in its place, which are kept anyway.

    A checkpoint around the activation would save nothing: the projection down keeps its input.
    """
    source, place, shape = gate_up.detach(), inner.data_ptr(), inner.shape

    def pack(saved: Tensor) -> Tensor | None:
        return None if saved.data_ptr() == place and saved.shape == shape else saved

    def unpack(kept: Tensor | None) -> Tensor:
        return activation(source) if kept is None else kept

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class Layer(nn.Module):
    """Attention and MLP, each with its norm before it (pre), behind it (post) or both."""

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
        self.norm_position, self.rope_theta = config.norm_position, config.rope_theta_of(index)
        norm = _norm(config, options, options["sequence_parallel"])
        self.attention = Attention(config, index, backend, options, recompute, attention)
        self.mlp = MLP(config, backend, options, recompute)
        self.attention_norm = backend.RMSNorm(config.hidden_size, **norm)
        self.mlp_norm = backend.RMSNorm(config.hidden_size, **norm)
        if config.norm_position == "both":
            self.attention_out_norm = backend.RMSNorm(config.hidden_size, **norm)
            self.mlp_out_norm = backend.RMSNorm(config.hidden_size, **norm)

    def forward(
        self, x: Tensor, rotation: rope.Rotation, documents: Documents, cache: LayerCache | None
    ) -> Tensor:
        out: Tensor
        if self.norm_position == "post":
            attended = self.attention(x, rotation, documents, cache)
            x = self.attention_norm(attended, residual=x)
            out = self.mlp_norm(self.mlp(x), residual=x)
            return out
        attended = self.attention(self.attention_norm(x), rotation, documents, cache)
        if self.norm_position == "pre":
            x = x + attended
            return x + self.mlp(self.mlp_norm(x))
        x = self.attention_out_norm(attended, residual=x)
        out = self.mlp_out_norm(self.mlp(self.mlp_norm(x)), residual=x)
        return out
