"""The product of few rows against a product in fp64, and what it refuses.

Letters: R rows, K columns, N outputs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megarlx.ops.narrow_product import MOST_ROWS, narrow_product_

DTYPES = [torch.float32, torch.float64]
SIZES = [(1, 16, 8), (3, 100, 7), (8, 1030, 33), (16, 4224, 5), (2, 0, 3), (0, 16, 4)]


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)


def product(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    out = torch.full((len(x), len(weight)), torch.nan, dtype=x.dtype, device=x.device)
    narrow_product_(x, weight, out, **options)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_is_the_product_and_the_bias(
    dtype: torch.dtype, size: tuple[int, int, int], with_bias: bool
) -> None:
    rows, columns, outputs = size
    x, weight = normal(rows, columns, dtype=dtype), normal(outputs, columns, dtype=dtype, seed=1)
    bias = normal(outputs, dtype=dtype, seed=2) if with_bias else None
    expected = x.double() @ weight.double().t()
    if bias is not None:
        expected += bias.double()
    atol, rtol = (1e-4, 1e-5) if dtype == torch.float32 else (1e-12, 1e-12)
    torch.testing.assert_close(
        product(x, weight, bias=bias).double(), expected, rtol=rtol, atol=atol
    )


@pytest.mark.not_emulated("on CUDA scales go with bf16, see tests/gpu")
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_stand_for_what_e4m3_left_out(dtype: torch.dtype) -> None:
    x, scales = normal(5, 48, dtype=dtype), normal(9, dtype=torch.float32, seed=3)
    weight = normal(9, 48, dtype=dtype, seed=1).to(torch.float8_e4m3fn)
    bias = normal(9, dtype=dtype, seed=2)
    expected = x @ (weight.to(dtype) * scales[:, None]).t().to(dtype) + bias
    torch.testing.assert_close(product(x, weight, bias=bias, scales=scales), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": (MOST_ROWS + 1, 16)},
            r"x is of shape \[17, 16\]; allowed: \[at most 16, ",
        ),
        ({"weight": (4, 15)}, r"weight is of shape \[4, 15\]; allowed: \[4, 16\]"),
        ({"out": (2, 5)}, r"out is of shape \[2, 5\]; allowed: \[2, 4\]"),
        ({"bias": (3,)}, r"bias is of shape \[3\]; allowed: \[4\]"),
        ({"scales": (4,)}, r"weight is Float; allowed: Float8_e4m3fn"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    shapes = {"x": (2, 16), "weight": (4, 16), "out": (2, 4), **change}
    given = {name: torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=rf"megarlx.narrow_product_: {message}"):
        narrow_product_(**given)


def test_a_transposed_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight is strided \[1, 16\]; allowed: contiguous"):
        narrow_product_(torch.zeros(2, 4), torch.zeros(4, 16).t(), torch.zeros(2, 16))


def test_opcheck() -> None:
    x, weight = normal(2, 16, dtype=torch.float32), normal(4, 16, dtype=torch.float32)
    given = (x, weight, None, None, False, torch.zeros(2, 4))
    torch.library.opcheck(torch.ops.megarlx.narrow_product_.default, given)
