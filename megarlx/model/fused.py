"""Elementwise parts of a layer with the fewest passes over memory, written once for any device.

On a CPU these passes, not the products, are what a small model waits for. Backward functions read
what they saved and never write it: pipeline schedules may run them twice.

Letters: T tokens, d the normalised width, F half the width of a fused gate and up projection.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    """y = x · w / rms(x), over rows of a matrix [T, d]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        width = x.shape[-1]
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(width)
        inverse = inverse.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        grad = grads[0]
        # both sums over the product with x are matrix-vector products: one read each
        product = grad * x
        grad_weight = torch.mv(product.t(), inverse[:, 0])
        shared = torch.mv(product, weight)[:, None].mul_(inverse**3).div_(-x.shape[-1])
        grad_x = torch.mul(grad, weight, out=product).mul_(inverse).addcmul_(x, shared)
        return grad_x, grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last dimension. CUDA has its own kernel, with sums in fp32."""
    if x.is_cuda or x.dtype not in (torch.float32, torch.float64):
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) · up of a fused [T, 2F]; backward fills one [T, 2F]."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        # its exponentials cost a CPU more than reading them back; on CUDA memory is dearer
        kept = None if gate_up.is_cuda else activated
        ctx.save_for_backward(gate_up, kept)
        return activated * up if kept is not None else activated.mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor]:
        gate_up, activated = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(grads[0], F.silu(gate) if activated is None else activated, out=grad_up)
        torch.mul(grads[0], up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return (out,)


def swiglu(gate_up: Tensor) -> Tensor:
    """[T, 2F], gate before up, to [T, F]."""
    return _SwiGLU.apply(gate_up)
