"""A linear layer whose backward adds its weight's gradient to `weight.grad` by the product itself.

Autograd makes the gradient of a bf16 weight in bf16 and adds it to the fp32 buffer afterwards: two
more passes, and a rounding. One product reads bf16 and adds to fp32.

Autograd is given no gradient then, and calls the hooks of the weight all the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megarlx.ops.elementwise import refuse_second_derivative
from megarlx.ops.product import linear, product, product_

DEVICES = {"cuda"}  # where it is faster; elsewhere autograd adds, as before


def adds_by_product(weight: Tensor) -> bool:
    """Whether there is a buffer for it, in fp32 or in the weight's own type."""
    buffer = weight.grad
    return (
        torch.is_grad_enabled()
        and weight.requires_grad
        and weight.device.type in DEVICES
        and buffer is not None
        and buffer.is_contiguous()
        and buffer.dtype in (torch.float32, weight.dtype)
    )


def add_product_(total: Tensor, upstream: Tensor, x: Tensor) -> None:
    """total [out, in] += upstream [..., out].T @ x [..., in]."""
    upstream, x = upstream.flatten(0, -2), x.flatten(0, -2)
    if total.device.type not in DEVICES:
        total.add_(product(upstream.mT, x))
    elif total.dtype == x.dtype:
        product_(total, upstream.mT, x, add=True)
    elif x.is_cuda:
        torch.addmm(total, upstream.mT, x, out_dtype=total.dtype, out=total)
    else:  # only CUDA has products of bf16 with an fp32 result
        total.addmm_(upstream.mT.to(total.dtype), x.to(total.dtype))


def added_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, whose backward adds the weight's gradient to `weight.grad`.

    Only for a backward that is made for the weights too: `autograd.grad` of something else would
    add them all the same.
    """
    out: Tensor = _AddedLinear.apply(x, weight, bias)
    return out


class _AddedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight = weight  # what is saved comes back as another object
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        refuse_second_derivative("added_linear", upstream)
        x, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        if needs_weight:
            with torch.no_grad():
                add_product_(ctx.weight.grad, upstream, x)
        return (
            product(upstream, weight) if needs_input else None,
            None,
            upstream.flatten(0, -2).sum(0) if needs_bias else None,
        )
