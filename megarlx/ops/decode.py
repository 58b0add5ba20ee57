"""The steps of cached decoding between its matrix products, on a CPU, into buffers of the caller.

B rows (one new token each, of which the first `rows` are real), H query heads, K key/value heads,
D head_dim, S slots, P pages of G places, n pages of a slot (model/kv_cache.py says how a table is
read; without one a slot is a page). Every row is worked on alone and reads its slot only as far as
it is filled: its bits depend on no other row, nor on where its pages lie. fp32 and fp64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megarlx.ops import native

native.load()


def decode_attention_(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor | None,
    slots: Tensor,
    positions: Tensor,
    cosines: Tensor,
    sines: Tensor,
    out: Tensor,
    *,
    scale: float,
    rows: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    inverse: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """QK-norm, rotation, the new key and value into the cache, and attention over the slot.

    qkv [B, (H + 2K) D] is the fused projection; keys and values [P, G, K, D] one layer's cache;
    table int32 [S, 1 + 2n]; slots and positions int64 [B]; cosines and sines [≥ n G, D/2]; out
    [B, H D]. The norm's weights
    are [H D] and [K D] (over the projection), [D] both (each head), or none. inverse [B, 2] gives
    1/rms of queries and keys where heads of other ranks count as well.
    """
    torch.ops.megarlx.decode_attention_(
        qkv,
        keys,
        values,
        table,
        slots,
        positions,
        cosines,
        sines,
        q_weight,
        k_weight,
        inverse,
        eps,
        scale,
        rows,
        out,
    )


def decode_norm_(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float, out: Tensor | None = None
) -> None:
    """Residual and RMSNorm together: x += norm(y), or with `out`: x += y, then out = norm(x)."""
    torch.ops.megarlx.decode_norm_(x, y, weight, eps, out)


def decode_swiglu_(gate_up: Tensor, out: Tensor) -> None:
    """silu(gate) · up of [B, 2F], gate before up, into out [B, F]."""
    torch.ops.megarlx.decode_swiglu_(gate_up, out)


def panel_columns(dtype: torch.dtype) -> int:
    """Output columns of a panel: 128 bytes of them."""
    return 128 // dtype.itemsize


def packed(weight: Tensor) -> Tensor:
    """[N, K] to panels [⌈N / columns⌉, K, columns]; columns behind N are zero."""
    columns = panel_columns(weight.dtype)
    whole = F.pad(weight, (0, 0, 0, -len(weight) % columns))
    return whole.view(-1, columns, weight.shape[1]).transpose(1, 2).contiguous()


def packed_gate_up(weight: Tensor) -> Tensor:
    """[2F, K], gate before up: a panel is half gate and half the same columns of up."""
    half = panel_columns(weight.dtype) // 2
    gate, up = (
        F.pad(part, (0, 0, 0, -len(part) % half)).view(-1, half, weight.shape[1])
        for part in weight.chunk(2)
    )
    return torch.cat((gate, up), 1).transpose(1, 2).contiguous()


@dataclass(frozen=True)
class PackedLayers:
    """The weights of L layers as a decode step reads them: matrices in panels, layers stacked."""

    qkv: Tensor  # [L, panels of (H + 2K) D, hidden, columns]
    o: Tensor  # [L, panels of hidden, H D, columns]
    gate_up: Tensor  # [L, panels of 2F, hidden, columns]
    down: Tensor  # [L, panels of hidden, F, columns]
    attention_norm: Tensor  # [L, hidden]
    mlp_norm: Tensor
    qkv_bias: Tensor | None = None  # [L, (H + 2K) D]
    q_norm: Tensor | None = None  # [L, H D], over the projection, or [L, D], of each head
    k_norm: Tensor | None = None


@dataclass(frozen=True)
class PackedHead:
    norm: Tensor  # [hidden]
    weight: Tensor  # [panels of V, hidden, columns]


def decode_step_(
    x: Tensor,
    layers: PackedLayers,
    keys: Tensor,
    values: Tensor,
    table: Tensor | None,
    slots: Tensor,
    positions: Tensor,
    cosines: Tensor,
    sines: Tensor,
    scratch: Tensor,
    *,
    rows: int,
    heads: int,
    intermediate: int,
    post: bool,
    eps: float,
    scale: float,
    tokens: Tensor | None = None,
    embedding: Tensor | None = None,
    head: PackedHead | None = None,
    logits: Tensor | None = None,
) -> None:
    """One token a row through all layers: x [B, hidden] in place, and logits [B, V].

    keys and values [L, P, G, K, D]. With tokens, x begins as their rows of `embedding`. `post` says
    that norms stand behind attention and MLP. scratch has rows · (2 hidden + (H + 2K) D + H D + F)
    elements. A row's result depends on nothing but the row, to the bit: not on how many there are.
    """
    torch.ops.megarlx.decode_step_(
        x,
        tokens,
        embedding,
        layers.qkv,
        layers.qkv_bias,
        layers.o,
        layers.gate_up,
        layers.down,
        layers.attention_norm,
        layers.mlp_norm,
        layers.q_norm,
        layers.k_norm,
        None if head is None else head.norm,
        None if head is None else head.weight,
        keys,
        values,
        table,
        slots,
        positions,
        cosines,
        sines,
        eps,
        scale,
        heads,
        intermediate,
        post,
        rows,
        scratch,
        logits,
    )


@torch.library.register_fake("megarlx::decode_step_")
def _(x: Tensor, *arguments: object) -> None:
    return None


@torch.library.register_fake("megarlx::decode_attention_")
def _(qkv: Tensor, *arguments: object) -> None:
    return None


@torch.library.register_fake("megarlx::decode_norm_")
def _(x: Tensor, *arguments: object) -> None:
    return None


@torch.library.register_fake("megarlx::decode_swiglu_")
def _(gate_up: Tensor, out: Tensor) -> None:
    return None
