"""The product of few rows on a card: right, and a row's bits depend on nothing beside it.

Letters: R rows, K columns, N outputs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megarlx.ops.e4m3 import e4m3_rows_, e4m3_rows_reference
from megarlx.ops.narrow_product import MOST_ROWS, narrow_product_

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
KINDS = [BF16, torch.float32, torch.float64, E4M3]  # of the weight
# one round of a block and several, parts of a pack, fewer columns than a warp's
SIZES = [(2048, 24), (4512, 9), (1027, 5), (40, 64)]
CLOSE = {BF16: 5e-3, torch.float32: 1e-6, torch.float64: 1e-14, E4M3: 5e-3}


def normal(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def inputs(kind: torch.dtype, columns: int, outputs: int) -> list[Any]:
    """x [16, K], W, bias, scales or None."""
    own = BF16 if kind == E4M3 else kind
    scales = (0.1 + normal(outputs, seed=3).abs()).float() if kind == E4M3 else None
    weight = normal(outputs, columns, seed=1).to(kind)
    return [normal(MOST_ROWS, columns).to(own), weight, normal(outputs, seed=2).to(own), scales]


def product(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None) -> Tensor:
    out = torch.full((len(x), len(weight)), torch.nan, dtype=x.dtype, device=x.device)
    narrow_product_(x, weight, out, bias=bias, scales=scales, dependent=True)
    return out


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_is_the_product(card: Any, kind: torch.dtype, size: tuple[int, int]) -> None:
    x, weight, bias, scales = given = inputs(kind, *size)
    wide = weight.double() if scales is None else weight.double() * scales.double()[:, None]
    expected = x.double() @ wide.t() + bias.double()
    for rows in (1, 5, 8, 9, 16):
        with card:
            found = product(card.moved(x)[:rows], *map(card.moved, given[1:]))
        gap = (found.cpu().double() - expected[:rows]).norm()
        assert gap <= CLOSE[kind] * expected[:rows].norm()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_row_has_the_same_bits_whatever_rows_there_are(
    on_card: Any, kind: torch.dtype, size: tuple[int, int]
) -> None:
    x, *rest = map(on_card.moved, inputs(kind, *size))
    whole = product(x, *rest)
    for rows in range(1, MOST_ROWS + 1):
        assert torch.equal(product(x[:rows], *rest), whole[:rows])
        assert torch.equal(product(x[-rows:], *rest), whole[-rows:])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_an_unaligned_weight_gives_the_same_bits(on_card: Any, kind: torch.dtype) -> None:
    x, weight, *rest = map(on_card.moved, inputs(kind, 2048, 9))
    buffer = torch.empty(weight.numel() + 1, dtype=kind, device=weight.device)
    shifted = buffer[1:].view(weight.shape)
    shifted.copy_(weight)
    assert torch.equal(product(x, shifted, *rest), product(x, weight, *rest))


def test_every_number_of_e4m3_is_widened_exactly(on_card: Any) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3)
    codes = codes[codes.float().isfinite()]
    for column in range(16):
        weight = torch.zeros(len(codes), 16, dtype=E4M3)
        weight[:, column] = codes
        x, scales = torch.ones(1, 16, dtype=BF16), torch.ones(len(codes))
        found = product(*map(on_card.moved, (x, weight)), None, on_card.moved(scales))
        assert torch.equal(found.cpu().float()[0], codes.float())


def test_what_is_no_number_stays_where_it_is(on_card: Any) -> None:
    x, weight, _, _ = map(on_card.moved, inputs(BF16, 256, 9))
    clean = product(x, weight, None, None)
    x[3, 5] = torch.nan
    weight[4, 7] = torch.inf
    found = product(x, weight, None, None)
    assert found[3].isnan().all()
    assert found[:, 4].isfinite().sum() == 0
    kept = [[r for r in range(MOST_ROWS) if r != 3], [n for n in range(9) if n != 4]]
    assert torch.equal(found[kept[0]][:, kept[1]], clean[kept[0]][:, kept[1]])


@pytest.mark.parametrize("columns", [2048, 131, 16])
@pytest.mark.parametrize("dtype", [BF16, torch.float32, torch.float64])
def test_rows_are_rounded_to_the_same_bits_as_torch_rounds(
    on_card: Any, dtype: torch.dtype, columns: int
) -> None:
    x = on_card.moved((normal(9, columns) * torch.logspace(-9, 9, 9)[:, None]).to(dtype))
    x[4, 7], x[5] = torch.nan, 0
    values = torch.zeros_like(x, dtype=E4M3)
    scales = torch.full((9,), torch.nan, device=x.device)
    e4m3_rows_(x, values, scales)
    expected = e4m3_rows_reference(x)
    kept = [i for i in range(9) if i != 4]
    assert torch.equal(values.view(torch.uint8)[kept], expected[0].view(torch.uint8)[kept])
    assert torch.equal(scales[kept], expected[1][kept])
    assert scales[4].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_beside_another_type_than_bf16_are_refused(on_card: Any, dtype: torch.dtype) -> None:
    x, weight, _, scales = map(on_card.moved, inputs(E4M3, 32, 4))
    with pytest.raises(ValueError, match="BFloat16, which scales go with there"):
        product(x.to(dtype), weight, None, scales)
