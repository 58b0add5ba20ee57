"""What backward of the token losses does on CUDA, seen on the emulated kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megarlx.ops.linear_token_loss import linear_token_loss
from megarlx.ops.loss_spec import LossSpec
from megarlx.ops.token_loss import token_loss


def losses(kind: str) -> tuple[Tensor, Tensor]:
    """(a loss, what its gradient is taken by)"""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(6, 5, generator=generator).requires_grad_()
    weight = torch.randn(11, 5, generator=generator)
    targets = torch.randint(0, 11, (6,), generator=generator)
    if kind == "logits":
        logits = (hidden @ weight.t()).detach().requires_grad_()
        return token_loss(logits, targets, LossSpec(), normalizer=2).loss, logits
    into = torch.zeros_like(weight) if kind == "accumulated" else None
    loss = linear_token_loss(
        hidden, weight, targets, LossSpec(), normalizer=2, weight_grad_=into
    ).loss
    return loss, hidden


@pytest.mark.parametrize("kind", ["logits", "hidden", "accumulated"])
def test_the_last_backward_scales_in_place_by_one_launch(
    kind: str, emulated_kernels: object, launches: Callable[[str], int]
) -> None:
    with emulated_kernels:
        loss, by = losses(kind)
        before = launches("scale_gradient_kernel")
        (whole,) = torch.autograd.grad(loss, by)
        assert launches("scale_gradient_kernel") == before + 1
    expected_loss, by = losses(kind)
    (expected,) = torch.autograd.grad(expected_loss, by)
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["logits", "hidden"])
def test_a_kept_graph_keeps_its_gradient(kind: str, emulated_kernels: object) -> None:
    with emulated_kernels:
        loss, by = losses(kind)
        (half,) = torch.autograd.grad(loss * 0.5, by, retain_graph=True)
        (whole,) = torch.autograd.grad(loss, by)
    torch.testing.assert_close(half * 2, whole)
