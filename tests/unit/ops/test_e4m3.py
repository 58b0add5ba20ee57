"""Rows rounded to e4m3 against torch's own conversion, bit for bit.

N rows of K columns.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megarlx.ops.e4m3 import E4M3, LARGEST, e4m3_rows_, e4m3_rows_reference

DTYPES = [torch.float32, torch.float64]


def normal(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    values, scales = torch.zeros_like(x, dtype=E4M3), torch.full((len(x),), torch.nan)
    e4m3_rows_(x, values, scales)
    return values, scales


def check(x: Tensor) -> None:
    for found, expected in zip(rounded(x), e4m3_rows_reference(x), strict=True):
        bits = torch.uint8 if found.dtype == E4M3 else torch.int32
        assert torch.equal(found.view(bits), expected.view(bits))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(7, 48), (1, 16), (40, 131), (3, 2060), (2, 0), (0, 8)], ids=str)
def test_it_is_torch_s_rounding(dtype: torch.dtype, size: tuple[int, int]) -> None:
    check((normal(*size) * torch.logspace(-30, 30, size[0])[:, None]).to(dtype))


def test_every_step_and_half_of_one_is_rounded_as_torch_does() -> None:
    """Ties go to the even neighbour, of subnormal numbers too."""
    codes = torch.arange(127, dtype=torch.uint8).view(E4M3).double()
    between = (codes[1:] + codes[:-1]) / 2
    near = torch.cat((codes, between, between * (1 + 2**-20), between * (1 - 2**-20)))
    row = torch.cat((near, -near, codes.new_tensor([LARGEST]))).float()
    check(row[None])
    assert rounded(row[None])[1].item() == 1


def test_a_number_is_within_a_sixteenth_and_a_row_s_largest_is_exact() -> None:
    x = normal(9, 64) * torch.logspace(-6, 6, 9)[:, None]
    values, scales = rounded(x)
    found, largest = values.double() * scales.double()[:, None], x.abs().amax(1)
    # half a step of three bits of fraction; below 2^-6 of the scale, half of the smallest step
    bound = torch.maximum(x.abs() / 16, largest[:, None] / LARGEST * 2**-10)
    assert ((found - x).abs() <= bound * 1.0001).all()
    torch.testing.assert_close(found.abs().amax(1), largest, rtol=1e-6, atol=0)


def test_rows_of_zeros_have_the_scale_1_and_rows_without_numbers_none() -> None:
    x = normal(4, 16)
    x[1] = 0
    x[2, 5], x[3, 6] = torch.nan, torch.inf
    values, scales = rounded(x)
    assert scales[1] == 1
    assert values[1].float().eq(0).all()
    assert not scales[2:].isfinite().any()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3), (2, 4), (2,)), r"values is of shape \[2, 4\]; allowed: \[2, 3\]"),
        (((2, 3), (2, 3), (3,)), r"scales is of shape \[3\]; allowed: \[2\]"),
        (((6,), (6,), (1,)), r"x is of shape \[6\]; allowed: \[at most"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    x, values, scales = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=rf"megarlx.e4m3_rows_: {message}"):
        e4m3_rows_(x, values.to(E4M3), scales)


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="x is Half; allowed: Float, Double"):
        e4m3_rows_(torch.zeros(1, 1).half(), torch.zeros(1, 1, dtype=E4M3), torch.zeros(1))
    with pytest.raises(ValueError, match="values is Float; allowed: Float8_e4m3fn"):
        e4m3_rows_(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1))


def test_opcheck() -> None:
    given = (normal(2, 16), torch.zeros(2, 16, dtype=E4M3), torch.zeros(2))
    torch.library.opcheck(
        torch.ops.megarlx.e4m3_rows_.default, given, test_utils=("test_faketensor",)
    )
