"""A linear layer whose weight gradient is made when it is asked for, against one without that."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megarlx.ops.delayed_linear import DelayedGradients, delayed_linear
from megarlx.ops.product import linear


def case(dtype: torch.dtype, *leading: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input [..., 5], weight [7, 5], bias [7], and the output's gradient [..., 7]."""
    draw = torch.Generator().manual_seed(3)
    shapes = ((*leading, 5), (7, 5), (7,), (*leading, 7))
    x, weight, bias, upstream = (
        torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes
    )
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), upstream


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leading", [(11,), (2, 3)])
def test_gradients_have_the_same_bits_and_the_weights_comes_when_asked_for(dtype, leading):
    x, weight, bias, upstream = case(dtype, *leading)
    linear(x, weight, bias).backward(upstream)
    expected = [x.grad, weight.grad, bias.grad]

    x, weight, bias, upstream = case(dtype, *leading)
    delayed = DelayedGradients()
    delayed_linear(x, weight, bias, delayed).backward(upstream)
    assert weight.grad is None
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(bias.grad, expected[2])
    delayed.add_oldest(weight)
    assert torch.equal(weight.grad, expected[1])
    assert not weight.grad.requires_grad
    assert not delayed.waiting


def test_each_asking_adds_the_oldest_gradient_to_what_is_there():
    x, weight, _, upstream = case(torch.float64, 11)
    first, second = upstream.T @ x.detach(), (2 * upstream).T @ x.detach()
    delayed = DelayedGradients()
    delayed_linear(x, weight, None, delayed).backward(upstream)
    delayed_linear(x, weight, None, delayed).backward(2 * upstream)
    buffer = torch.ones(7, 5, dtype=torch.float64)
    weight.grad = buffer
    for expected in (1 + first, 1 + first + second, 1 + first + second):  # then nothing waits
        delayed.add_oldest(weight)
        torch.testing.assert_close(buffer, expected)
        assert weight.grad is buffer


def test_what_needs_no_gradient_gets_none_and_without_grad_nothing_is_kept():
    x, weight, _, upstream = case(torch.float64, 11)
    delayed = DelayedGradients()
    delayed_linear(x, weight.detach(), None, delayed).backward(upstream)
    assert not delayed.waiting
    assert x.grad is not None
    delayed_linear(x.detach(), weight, None, delayed).backward(upstream)
    assert len(delayed.waiting) == 1
    with torch.no_grad():
        assert not delayed_linear(x, weight, None, delayed).requires_grad
    assert len(delayed.waiting) == 1


def test_a_second_derivative_is_refused():
    x, weight, _, upstream = case(torch.float64, 11)
    out = delayed_linear(x, weight, None, DelayedGradients())
    with pytest.raises(RuntimeError, match="create_graph is True"):
        torch.autograd.grad(out, x, upstream, create_graph=True)
