"""RMSNorm, SwiGLU and heads on CUDA, in bf16 too, against the reference in fp64.

The autograd of the ops runs with them. Letters: T rows, d and F widths, H and K heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megarlx.ops.elementwise import (
    _Heads,
    attention_heads,
    attention_heads_reference,
    rms_norm,
    rms_norm_reference,
    swiglu_reference,
)

pytestmark = pytest.mark.gpu

EPS = 1e-5
# Of results of this type: half the distance of two neighbours, and the rounding of the sums.
RELATIVE = {torch.bfloat16: 3e-3, torch.float32: 1e-6, torch.float64: 1e-13}
Function = Callable[..., tuple[Tensor, ...]]


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)


def run(function: Function, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Results and gradients, under upstream gradients that `dtype` can hold."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = function(*leaves)
    upstream = [normal(*r.shape, dtype=dtype, seed=9).to(r) for r in results]
    return [x.detach() for x in (*results, *torch.autograd.grad(results, leaves, upstream))]


def check(card: Any, ours: Function, reference: Function, inputs: list[Tensor]) -> None:
    dtype = inputs[0].dtype
    with card:
        found = run(ours, card.moved(inputs), dtype)
    wanted = run(reference, [x.double() for x in inputs], dtype)
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.dtype == dtype
        gap = (a.cpu().double() - b).norm()
        assert gap <= RELATIVE[dtype] * b.norm(), f"result {i}: {gap} of {b.norm()}"


def norm(x: Tensor, weight: Tensor, *residual: Tensor) -> tuple[Tensor, ...]:
    return (torch.ops.megarlx.rms_norm(x, weight, EPS, *residual)[0],)


def norm_reference(x: Tensor, weight: Tensor, *residual: Tensor) -> tuple[Tensor, ...]:
    return (rms_norm_reference(x, weight, EPS, *residual),)


@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize("width", [3, 7, 64, 192, 2048, 4104])
@pytest.mark.parametrize("rows", [1, 33, 300])
def test_rms_norm(card: Any, dtype: torch.dtype, width: int, rows: int) -> None:
    rows = min(rows, card.size(rows, 33 if width > 1000 else rows))
    inputs = [normal(rows, width, dtype=dtype), normal(width, dtype=dtype, seed=1)]
    check(card, norm, norm_reference, inputs)
    check(card, norm, norm_reference, [*inputs, normal(rows, width, dtype=dtype, seed=2)])


@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize("width", [1, 8, 33, 160, 1728, 8192])
def test_swiglu(card: Any, dtype: torch.dtype, width: int) -> None:
    rows = card.size(77, 9)
    check(
        card,
        lambda x: (torch.ops.megarlx.swiglu(x),),
        lambda x: (swiglu_reference(x),),
        [3 * normal(rows, 2 * width, dtype=dtype)],
    )


@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize("kind", ["none", "full", "per_head"])
@pytest.mark.parametrize(
    "shape", [(4, 2, 22), (2, 2, 32), (1, 1, 2), (3, 1, 64), (16, 16, 128), (8, 2, 96)], ids=str
)
def test_heads(card: Any, dtype: torch.dtype, kind: str, shape: tuple[int, int, int]) -> None:
    h, k, dim = shape
    tokens = card.size(130, 19)
    angles = normal(tokens, 1, dim // 2, seed=3)
    turn = [angles.cos().to(dtype), angles.sin().to(dtype)]
    sizes = {"none": (), "full": (h * dim, k * dim), "per_head": (dim, dim)}[kind]
    weights = [normal(n, dtype=dtype, seed=5 + i) for i, n in enumerate(sizes)]

    def of(function: Callable[..., tuple[Tensor, ...]]) -> Function:
        def called(qkv: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
            names = ("q_weight", "k_weight")
            named = dict(zip(names, weights, strict=True)) if weights else {}
            moved = [x.to(qkv.device, qkv.dtype) for x in turn]
            return function(qkv, *moved, h, k, **named, eps=EPS)

        return called

    inputs = [normal(tokens, (h + 2 * k) * dim, dtype=dtype), *weights]
    check(card, of(attention_heads), of(attention_heads_reference), inputs)


@pytest.mark.parametrize("dtype", list(RELATIVE))
def test_gradients_of_weights_are_in_fp32_or_better(on_card: Any, dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, weight = on_card.moved([normal(5, 16, dtype=dtype), normal(16, dtype=dtype)])
    _, inverse = torch.ops.megarlx.rms_norm(x, weight, EPS)
    _, by_weight = torch.ops.megarlx.rms_norm_backward(x, x, weight, inverse, True)
    assert inverse.dtype == by_weight.dtype == wide


def test_a_sum_over_many_rows_in_bf16_does_not_stop_growing(on_card: Any) -> None:
    """In bf16 itself 1 + 1 + … ends at 256."""
    rows = on_card.size(20_000, 3000)
    x, weight = on_card.moved([torch.ones(rows, 8).bfloat16(), torch.ones(8).bfloat16()])
    _, inverse = torch.ops.megarlx.rms_norm(x, weight, 0.0)
    _, by_weight = torch.ops.megarlx.rms_norm_backward(x, x, weight, inverse, True)
    assert by_weight.tolist() == [rows] * 8


@pytest.mark.parametrize("dtype", list(RELATIVE))
def test_unaligned_rows_give_the_same_bits(on_card: Any, dtype: torch.dtype) -> None:
    h, k, dim, tokens = 3, 1, 32, 21
    turn = on_card.moved([normal(tokens, 1, dim // 2, dtype=dtype, seed=i) for i in (3, 4)])
    qkv = on_card.moved(normal(tokens, (h + 2 * k) * dim, dtype=dtype))
    weights = on_card.moved([normal(n * dim, dtype=dtype, seed=5) for n in (h, k)])
    apart = torch.nn.functional.pad(qkv, (3, 4))[:, 3:-4]
    found = []
    for given in (qkv, apart):
        leaves = [x.detach().requires_grad_() for x in (given, *weights)]
        out = _Heads.apply(leaves[0], *leaves[1:], *turn, h, k, EPS, None)
        upstream = [normal(*x.shape, dtype=dtype, seed=8).to(x.device) for x in out]
        found.append((*out, *torch.autograd.grad(out, leaves, upstream)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.ops.megarlx.swiglu(apart), torch.ops.megarlx.swiglu(qkv))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", list(RELATIVE))
def test_the_model_functions_take_the_kernels(dtype: torch.dtype) -> None:
    x, weight = (normal(*shape, dtype=dtype).cuda() for shape in ((5, 16), (16,)))
    ours = torch.ops.megarlx.rms_norm(x, weight, EPS, x)[0]
    assert torch.equal(rms_norm(x, weight, EPS, x), ours)
