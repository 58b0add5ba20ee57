"""Products with weights in e4m3: what they are rounded to, and how they are multiplied.

An output channel (a row of a matrix) has a scale, its largest weight over e4m3's largest number.
Few rows are multiplied as they are, by weights that the kernel widens to bf16; more rows are
rounded too, by row, for torch's scaled product. On a CPU both are plain torch: the twin that tests
compare with. The head keeps its own precision.

Letters: W rows, K columns, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megarlx.generation.decoders.products import Product, Products
from megarlx.ops.narrow_product import narrow_product_

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
NUMBERS_AT_ONCE = 1 << 24  # so many are held in fp32 while they are rounded


def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 [N, K] and fp32 [N]: `rows` are nearly their product. NaN and infinity make the scale
    of their row no finite number."""
    wide = rows.float()
    largest = wide.abs().amax(1)
    scales = torch.where(largest == 0, 1.0, largest / LARGEST)
    return (wide / scales[:, None]).to(E4M3), scales


@dataclass(frozen=True)
class Fp8Weight:
    """Kept from rollout to rollout, since graphs hold its place."""

    values: Tensor  # e4m3 [N, K]
    scales: Tensor  # fp32 [N]

    @staticmethod
    def like(weight: Tensor) -> Fp8Weight:
        scales = torch.ones(len(weight), device=weight.device)
        return Fp8Weight(torch.zeros_like(weight, dtype=E4M3), scales)

    def take_(self, weight: Tensor) -> None:
        at_once = max(1, NUMBERS_AT_ONCE // weight.shape[1])
        parts = (x.split(at_once) for x in (weight, self.values, self.scales))
        for given, values, scales in zip(*parts, strict=True):
            for target, source in zip((values, scales), rounded(given), strict=True):
                target.copy_(source)


def scaled_product_(x: Tensor, weight: Fp8Weight, out: Tensor, bias: Tensor | None = None) -> None:
    """out [W, N] = x weightᵀ + bias, x [W, K] rounded by row too."""
    values, scales = rounded(x)
    if x.device.type == "cpu":
        product = values.to(x.dtype) @ weight.values.to(x.dtype).t()
        torch.mul(product, scales[:, None] * weight.scales, out=out)
        if bias is not None:
            out.add_(bias)
        return
    by_row = F.ScalingType.RowWise
    product = F.scaled_mm(
        values,
        weight.values.t(),
        scales[:, None],
        by_row,
        weight.scales[None],
        by_row,
        bias=bias,
        output_dtype=out.dtype,
    )
    out.copy_(product)


class Fp8Products(Products):
    """Of weights that are rounded anew whenever a generation begins."""

    def __init__(self, most_rows: int) -> None:
        super().__init__(most_rows)
        self.kept: dict[str, Fp8Weight] = {}

    def by(self, place: str, weight: Tensor, bias: Tensor | None = None) -> Product:
        if place == "head":
            return super().by(place, weight, bias)
        if place not in self.kept:
            self.kept[place] = Fp8Weight.like(weight)
        kept = self.kept[place]
        kept.take_(weight)
        if not self.narrow:
            return lambda x, out: scaled_product_(x, kept, out, bias)
        return lambda x, out: narrow_product_(
            x, kept.values, out, bias=bias, scales=kept.scales, dependent=True
        )
