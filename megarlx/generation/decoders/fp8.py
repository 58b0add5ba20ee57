"""Products with weights in e4m3: what they are rounded to, and how they are multiplied.

An output channel (a row of a matrix) has a scale of its own (ops/e4m3.py). Few rows are multiplied
as they are, by weights that the kernel widens to bf16; more rows are rounded too, by row, for
torch's scaled product. On a CPU both are plain torch: the twin that tests compare with. The head
keeps its own precision.

Letters: W rows, K columns, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megarlx.generation.decoders.products import Product, Products
from megarlx.ops.e4m3 import E4M3, e4m3_rows_
from megarlx.ops.narrow_product import narrow_product_


@dataclass(frozen=True)
class Fp8Rows:
    """Kept from rollout to rollout where they are weights, since graphs hold their place."""

    values: Tensor  # e4m3 [N, K]
    scales: Tensor  # fp32 [N]

    @staticmethod
    def like(rows: Tensor) -> Fp8Rows:
        values = torch.empty_like(rows, dtype=E4M3)
        return Fp8Rows(values, torch.empty(len(rows), device=rows.device))

    def take_(self, rows: Tensor) -> Fp8Rows:
        e4m3_rows_(rows, self.values, self.scales)
        return self


def scaled_product_(x: Tensor, weight: Fp8Rows, out: Tensor, bias: Tensor | None = None) -> None:
    """out [W, N] = x weightᵀ + bias, x [W, K] rounded by row too."""
    rows = Fp8Rows.like(x).take_(x)
    if x.device.type == "cpu":
        product = rows.values.to(x.dtype) @ weight.values.to(x.dtype).t()
        torch.mul(product, rows.scales[:, None] * weight.scales, out=out)
        if bias is not None:
            out.add_(bias)
        return
    by_row = F.ScalingType.RowWise
    product = F.scaled_mm(
        rows.values,
        weight.values.t(),
        rows.scales[:, None],
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
        self.kept: dict[str, Fp8Rows] = {}

    def by(self, place: str, weight: Tensor, bias: Tensor | None = None) -> Product:
        if place == "head":
            return super().by(place, weight, bias)
        if place not in self.kept:
            self.kept[place] = Fp8Rows.like(weight)
        kept = self.kept[place]
        kept.take_(weight)
        if not self.narrow:
            return lambda x, out: scaled_product_(x, kept, out, bias)
        return lambda x, out: narrow_product_(
            x, kept.values, out, bias=bias, scales=kept.scales, dependent=True
        )
