"""A layer's weights, for decoders that multiply by themselves: read where training writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from torch.nn import Module

from megarlx.model.transformer_layer import Layer


@dataclass(frozen=True)
class LayerWeights:
    """Views of one layer's weights; matrices as [in, out]."""

    qkv: Tensor
    qkv_bias: Tensor | None
    o: Tensor
    gate_up: Tensor
    down: Tensor
    attention_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None


def weights_of(module: Module) -> dict[str, Any]:
    """The fields of LayerWeights."""
    layer = cast(Layer, module)
    attention, mlp = layer.attention, layer.mlp
    normed = attention.qk_norm != "none"
    bias = getattr(attention.qkv, "bias", None)  # Transformer Engine: empty where there is none
    return {
        "qkv": attention.qkv.weight.detach().t(),
        "qkv_bias": bias.detach() if bias is not None and bias.numel() else None,
        "o": attention.o.weight.detach().t(),
        "gate_up": mlp.gate_up.weight.detach().t(),
        "down": mlp.down.weight.detach().t(),
        "attention_norm": layer.attention_norm.weight.detach(),
        "mlp_norm": layer.mlp_norm.weight.detach(),
        "q_norm": attention.q_norm.weight.detach() if normed else None,
        "k_norm": attention.k_norm.weight.detach() if normed else None,
    }
