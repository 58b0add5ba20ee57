"""How many kernels each op launches on CUDA, counted on the emulated ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megarlx.ops.elementwise import attention_heads, rms_norm, swiglu

KERNELS = (
    *("rms_norm_kernel", "rms_norm_backward_kernel", "sum_blocks_kernel", "swiglu_kernel"),
    *("swiglu_backward_kernel", "heads_kernel", "heads_backward_kernel"),
)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).requires_grad_()


def of_heads() -> tuple[Callable[..., object], tuple[torch.Tensor, ...]]:
    turn = torch.rand(6, 1, 4)

    def called(qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor) -> object:
        return attention_heads(qkv, turn, turn, 2, 1, q_weight=q_weight, k_weight=k_weight)

    return called, (drawn(6, 32), drawn(16), drawn(8))


OPS: dict[str, tuple[Callable[..., object], tuple[torch.Tensor, ...], int, int]] = {
    "norm + residual": (
        lambda x, w, y: rms_norm(x, w, 1e-5, y), (drawn(6, 8), drawn(8), drawn(6, 8)), 1, 2,
    ),
    "swiglu": (swiglu, (drawn(6, 16),), 1, 1),
    "heads": (*of_heads(), 1, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", list(OPS))
def test_an_op_launches_one_kernel_forward_and_one_more_for_weights_backward(
    name: str, emulated_kernels: object, launches: Callable[[str], int]
) -> None:
    function, inputs, forward, backward = OPS[name]

    def launched() -> int:
        return sum(launches(kernel) for kernel in KERNELS)

    with emulated_kernels:
        before = launched()
        out = function(*inputs)
        assert launched() == before + forward
        results = out if isinstance(out, tuple) else (out,)
        torch.autograd.grad(results, inputs, [torch.ones_like(x) for x in results])
        assert launched() == before + forward + backward
