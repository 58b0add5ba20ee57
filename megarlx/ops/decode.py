"""The steps of cached decoding between its matrix products, on a CPU, into buffers of the caller.

B rows (one new token each, of which the first `rows` are real), H query heads, K key/value heads,
D head_dim, S slots, M places a slot. Every row is worked on alone and reads its slot only as far as
it is filled: its bits depend on no other row. fp32 and fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megarlx.ops import native

native.load()


def decode_attention_(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
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

    qkv [B, (H + 2K) D] is the fused projection; keys and values [S, M, K, D] one layer's cache;
    slots and positions int64 [B]; cosines and sines [≥ M, D/2]; out [B, H D]. The norm's weights
    are [H D] and [K D] (over the projection), [D] both (each head), or none. inverse [B, 2] gives
    1/rms of queries and keys where heads of other ranks count as well.
    """
    torch.ops.megarlx.decode_attention_(
        qkv,
        keys,
        values,
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


@torch.library.register_fake("megarlx::decode_attention_")
def _(qkv: Tensor, *arguments: object) -> None:
    return None


@torch.library.register_fake("megarlx::decode_norm_")
def _(x: Tensor, *arguments: object) -> None:
    return None


@torch.library.register_fake("megarlx::decode_swiglu_")
def _(gate_up: Tensor, out: Tensor) -> None:
    return None
