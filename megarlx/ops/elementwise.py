"""The elementwise parts of a layer: RMSNorm, SwiGLU, GeGLU, and the heads that attention looks at.

These passes over memory are what the products of a small model wait for on a CPU, and a quarter of
a training step on a GPU: each op reads its input once and writes its result once, in fp32 and fp64,
and on CUDA in bf16, computed in fp32. In other dtypes the same functions are torch's own kernels
(`F.rms_norm`, `F.silu`); GeGLU is torch's everywhere. Backward reads what forward saved and never
writes it, since pipeline schedules may run it twice. The gradient of a norm's weight is summed over
fixed blocks of rows, so that no result depends on the number of threads; that of a bf16 weight is
in fp32.

Letters: T tokens, d a normalised width, F half the width of a fused gate and up projection,
H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megarlx.comm.collectives import all_reduce_
from megarlx.comm.groups import Group
from megarlx.ops import native

CPU_DTYPES = (torch.float32, torch.float64)
CUDA_DTYPES = (*CPU_DTYPES, torch.bfloat16) if native.load().built_with["cuda"] else ()


def is_native(x: Tensor) -> bool:
    """Whether the compiled kernels take this tensor."""
    return x.dtype in CPU_DTYPES if x.is_cpu else x.is_cuda and x.dtype in CUDA_DTYPES


def refuse_second_derivative(op: str, upstream: Tensor) -> None:
    """Backward records a graph only when it is to be differentiated again (or is traced)."""
    if torch.is_grad_enabled() and type(upstream) is Tensor:
        raise RuntimeError(
            f"megarlx.{op}: create_graph is True; allowed: False, its gradient has no derivative"
        )


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """weight · x / rms(x) over the last dimension, plus `residual`, of the shape of x.

    A weight of a wider type than x is multiplied in it, before the result is rounded.
    """
    if not (is_native(x) and weight.dtype == x.dtype):
        return rms_norm_reference(x, weight, eps, residual)
    if x.dim() == 2:
        out: Tensor = torch.ops.megarlx.rms_norm(x, weight, eps, residual)[0]
        return out
    rows = None if residual is None else residual.reshape(-1, x.shape[-1])
    y: Tensor = torch.ops.megarlx.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps, rows)[0]
    return y.view(x.shape)


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor:
    y = F.rms_norm(x.to(weight.dtype), (x.shape[-1],), weight, eps).to(x.dtype)
    return y if residual is None else residual + y


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up: [T, 2F], gate before up, to [T, F]."""
    out: Tensor
    if is_native(gate_up):
        out = torch.ops.megarlx.swiglu(gate_up)
    else:
        out = _TorchSwiGLU.apply(gate_up)
    return out


def swiglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _TorchSwiGLU(torch.autograd.Function):
    """With torch's kernels, keeping gate and up alone; backward fills one [T, 2F]."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor]:
        refuse_second_derivative("swiglu", grads[0])
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(grads[0], F.silu(gate), out=grad_up)
        torch.mul(grads[0], up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return (out,)


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) · up, by the approximation with tanh: [T, 2F], gate before up, to [T, F]."""
    out: Tensor = _TorchGeGLU.apply(gate_up)
    return out


class _TorchGeGLU(torch.autograd.Function):
    """With torch's kernels, keeping gate and up alone; backward fills one [T, 2F]."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh").mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor]:
        refuse_second_derivative("geglu", grads[0])
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(grads[0], F.gelu(gate, approximate="tanh"), out=grad_up)
        upstream = grads[0] * up
        torch.ops.aten.gelu_backward.grad_input(
            upstream, gate, approximate="tanh", grad_input=grad_gate
        )
        return (out,)


class _Heads(torch.autograd.Function):
    """Values are a view, which an op with a schema may not return and still be traced; that is why
    this function is in Python. Backward writes the gradient of the fused projection once."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        heads: int,
        kv_heads: int,
        eps: float,
        group: Group | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = (q_weight, k_weight)
        q, k, inverse = _heads(qkv, *weights, cos, sin, heads, kv_heads, eps, group)
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin, inverse)
        ctx.group = group
        return q, k, values_of(qkv, heads, kv_heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("attention_heads", grads[0])
        *inputs, inverse = ctx.saved_tensors
        with_weights = any(ctx.needs_input_grad[1:3])
        sums, ranks = None, 1
        if ctx.group is not None:
            sums = torch.ops.megarlx._heads_backward_sums(*grads[:2], *inputs)
            all_reduce_(sums, ctx.group)
            ranks = ctx.group.size
        grad_qkv, grad_q_weight, grad_k_weight = torch.ops.megarlx._heads_backward(
            *grads, *inputs, inverse, with_weights, sums, ranks
        )
        weights = (grad_q_weight, grad_k_weight) if with_weights else (None, None)
        return grad_qkv, *weights, None, None, None, None, None, None


def _heads(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    eps: float,
    group: Group | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and the inverses of their norms; with a group the norms span the heads of its ranks."""
    sums, ranks = None, 1
    if group is not None:
        sums = all_reduce_(torch.ops.megarlx._heads_sums(qkv, heads, kv_heads), group)
        ranks = group.size
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.megarlx._heads(
        qkv, q_weight, k_weight, cos, sin, heads, kv_heads, eps, sums, ranks
    )
    return found


def values_of(qkv: Tensor, heads: int, kv_heads: int) -> Tensor:
    """The value heads [T, K, D] of a fused projection, where they stand."""
    all_heads = heads + 2 * kv_heads
    return qkv.unflatten(1, (all_heads, -1))[:, heads + kv_heads :]


def attention_heads(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    group: Group | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, H, D], k and v [T, K, D] of a fused projection [T, (H + 2K)·D]; native dtypes only.

    With weights q and k are normalised: all heads of a token together where a weight has H·D (K·D)
    numbers, each for itself where it has D. Then they are rotated by cos and sin [T, 1, D/2].
    With a group the norm spans the heads of all its ranks, which have H and K each: one reduction
    of two numbers a token, forward and backward.
    """
    over = group if group is not None and group.size > 1 else None
    arguments = (qkv, q_weight, k_weight, cos, sin, heads, kv_heads, eps, over)
    if torch.is_grad_enabled() and qkv.requires_grad:
        q, k, v = _Heads.apply(*arguments)
        return q, k, v
    q, k, _ = _heads(*arguments)
    return q, k, values_of(qkv, heads, kv_heads)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D] with the pair (i, i + D/2) turned by its angle; cos and sin [T, 1, D/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attention_heads_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    dim = qkv.shape[1] // (heads + 2 * kv_heads)

    def normalised(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return x
        return rms_norm_reference(x.reshape(len(x), -1, weight.numel()), weight, eps)

    q, k, v = qkv.split((heads * dim, kv_heads * dim, kv_heads * dim), dim=1)
    q = normalised(q, q_weight).reshape(len(q), heads, dim)
    k = normalised(k, k_weight).reshape(len(k), kv_heads, dim)
    return rotate_reference(q, cos, sin), rotate_reference(k, cos, sin), v.unflatten(1, (-1, dim))


def _norm_count(
    q_weight: Tensor | None, k_weight: Tensor | None, heads: int, kv_heads: int, dim: int
) -> int:
    """Of one token, as the kernel counts them."""
    if q_weight is None or k_weight is None:
        return 0
    full = q_weight.numel() == heads * dim and k_weight.numel() == kv_heads * dim
    return 2 if full else heads + kv_heads


def _precision(x: Tensor) -> torch.dtype:
    """Of norms, their sums and the gradients of their weights."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.register_fake("megarlx::rms_norm")
def _(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, ...]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(x.shape[0], dtype=_precision(x))


@torch.library.register_fake("megarlx::rms_norm_backward")
def _(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, with_weight: bool
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, x.new_empty(x.shape[1] if with_weight else 0, dtype=_precision(x))


@torch.library.register_fake("megarlx::swiglu")
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@torch.library.register_fake("megarlx::swiglu_backward")
def _(grad: Tensor, gate_up: Tensor) -> Tensor:
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


@torch.library.register_fake("megarlx::_heads")
def _(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    eps: float,
    sums: Tensor | None = None,
    ranks: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, dim = qkv.shape[0], qkv.shape[1] // (heads + 2 * kv_heads)
    norms = _norm_count(q_weight, k_weight, heads, kv_heads, dim)
    return (
        qkv.new_empty(tokens, heads, dim),
        qkv.new_empty(tokens, kv_heads, dim),
        qkv.new_empty(tokens, norms, dtype=_precision(qkv)),
    )


@torch.library.register_fake("megarlx::_heads_backward")
def _(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    inverse: Tensor,
    with_weights: bool,
    sums: Tensor | None = None,
    ranks: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    def like(weight: Tensor | None) -> Tensor:
        count = 0 if weight is None or not with_weights else weight.numel()
        return qkv.new_empty(count, dtype=_precision(qkv))

    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    return grad_qkv, like(q_weight), like(k_weight)


@torch.library.register_fake("megarlx::_heads_sums")
def _(qkv: Tensor, heads: int, kv_heads: int) -> Tensor:
    return qkv.new_empty(qkv.shape[0], 2, dtype=_precision(qkv))


@torch.library.register_fake("megarlx::_heads_backward_sums")
def _(grad_q: Tensor, grad_k: Tensor, qkv: Tensor, *others: Tensor) -> Tensor:
    return qkv.new_empty(qkv.shape[0], 2, dtype=_precision(qkv))
