"""A linear layer that adds its weight's gradient by the product itself, against autograd's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megarlx.ops import weight_gradient
from megarlx.ops.product import linear, product
from megarlx.ops.weight_gradient import add_product_, added_linear, adds_by_product


@pytest.fixture(autouse=True)
def on_a_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_gradient, "DEVICES", {"cpu", "cuda"})


def case(dtype: torch.dtype, *leading: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input [..., 5], weight [7, 5], bias [7], and the output's gradient [..., 7]."""
    draw = torch.Generator().manual_seed(3)
    shapes = ((*leading, 5), (7, 5), (7,), (*leading, 7))
    x, weight, bias, upstream = (
        torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes
    )
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), upstream


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("leading", [(11,), (2, 3)])
def test_gradients_are_autograds(dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    x, weight, bias, upstream = case(dtype, *leading)
    for leaf in (weight, bias):
        leaf.grad = torch.ones_like(leaf)
    linear(x, weight, bias).backward(upstream)
    expected = [t.grad for t in (x, weight, bias)]

    x, weight, bias, upstream = case(dtype, *leading)
    weight.grad, bias.grad = torch.ones_like(weight), torch.ones_like(bias)
    buffer = weight.grad
    out = added_linear(x, weight, bias)
    assert torch.equal(out, linear(x, weight, bias))
    out.backward(upstream)
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(bias.grad, expected[2])
    torch.testing.assert_close(weight.grad, expected[1])
    assert weight.grad is buffer
    heard: list[Tensor] = []
    weight.register_post_accumulate_grad_hook(heard.append)
    out = added_linear(x, weight, None)
    out.backward(upstream)
    torch.testing.assert_close(buffer, 2 * expected[1] - 1)
    assert len(heard) == 1  # though autograd was given nothing
    assert heard[0] is weight


def test_a_bf16_weights_gradient_is_not_rounded_to_bf16() -> None:
    x, weight, _, upstream = case(torch.bfloat16, 64)
    weight.grad_dtype = torch.float32
    weight.grad = torch.zeros(weight.shape)
    added_linear(x, weight, None).backward(upstream)
    exact = upstream.double().T @ x.detach().double()
    assert (weight.grad - exact).norm() <= 1e-6 * exact.norm()
    rounded = (upstream.T @ x.detach()).double()
    assert (rounded - exact).norm() > 1e-4 * exact.norm()


def test_there_has_to_be_a_buffer_and_a_gradient_to_make() -> None:
    weight = torch.ones(7, 5, dtype=torch.bfloat16, requires_grad=True)
    weight.grad_dtype = None
    assert not adds_by_product(weight)
    for buffer, fits in (
        (torch.zeros(7, 5), True),
        (torch.zeros(7, 5, dtype=torch.bfloat16), True),
        (torch.zeros(7, 5, dtype=torch.float64), False),
        (torch.zeros(5, 7).T, False),
    ):
        weight.grad = buffer
        assert adds_by_product(weight) == fits
    weight.grad = torch.zeros(7, 5)
    with torch.no_grad():
        assert not adds_by_product(weight)
    weight.requires_grad_(False)
    assert not adds_by_product(weight)


def test_elsewhere_than_on_cuda_autograd_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    weight = torch.ones(7, 5, requires_grad=True)
    weight.grad = torch.zeros(7, 5)
    assert not adds_by_product(weight)
    x, _, _, upstream = case(torch.float32, 11)
    total, expected = torch.full((7, 5), 0.3), torch.full((7, 5), 0.3)
    add_product_(total, upstream, x.detach())
    assert torch.equal(total, expected.add_(product(upstream.T, x.detach())))


def test_a_second_derivative_is_refused() -> None:
    x, weight, _, upstream = case(torch.float64, 11)
    weight.grad = torch.zeros_like(weight)
    out = added_linear(x, weight, None)
    with pytest.raises(RuntimeError, match="create_graph is True"):
        torch.autograd.grad(out, x, upstream, create_graph=True)
