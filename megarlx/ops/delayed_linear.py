"""A linear layer whose weight gradient waits until it is asked for.

A pipeline schedule that splits backward sends a stage's input gradient on first, and fills with the
weight gradients the time in which it would wait.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from megarlx.ops.elementwise import refuse_second_derivative
from megarlx.ops.product import linear, product
from megarlx.ops.weight_gradient import add_product_


class DelayedGradients:
    """Of one weight: the input and the output's gradient of each backward, oldest first."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[Tensor, Tensor]] = deque()

    def add_oldest(self, weight: Tensor) -> None:
        """Adds to `weight.grad` the product that has waited longest, if any does: a micro-batch may
        not have used the weight."""
        if not self.waiting:
            return
        x, upstream = self.waiting.popleft()
        with torch.no_grad():
            if weight.grad is None:
                weight.grad = product(upstream.flatten(0, -2).mT, x.flatten(0, -2))
            else:
                add_product_(weight.grad, upstream, x)


def delayed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, delayed: DelayedGradients
) -> Tensor:
    """`F.linear`, whose backward leaves the weight's gradient to `delayed`."""
    if not torch.is_grad_enabled():
        return linear(x, weight, bias)
    out: Tensor = _DelayedLinear.apply(x, weight, bias, delayed)
    return out


class _DelayedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, delayed: DelayedGradients
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.delayed = delayed
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        refuse_second_derivative("delayed_linear", upstream)
        x, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if needs_weight:
            ctx.delayed.waiting.append((x, upstream))
        return (
            product(upstream, weight) if needs_input else None,
            None,
            upstream.flatten(0, -2).sum(0) if needs_bias else None,
            None,
        )
