"""The products of a decode step: by which kernel a matrix is multiplied, and what is read of it.

Few rows are multiplied by `narrow_product_`, which reads a matrix once and gives a row the same
bits whatever is beside it. The library's product of more rows has other bits, so which of the two
it is follows from the most rows that a decoder was made for, never from those of a step.

Letters: W rows, K columns of the matrix, N its rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megarlx.ops.narrow_product import MOST_ROWS, narrow_product_

Product = Callable[[Tensor, Tensor], object]  # of x [W, K], into [W, N]


class Products:
    """Of the weights where training writes them."""

    def __init__(self, most_rows: int) -> None:
        self.narrow = most_rows <= MOST_ROWS

    def by(self, place: str, weight: Tensor, bias: Tensor | None = None) -> Product:
        """With weight [N, K] and bias [N]; `place` names the matrix in the model."""
        if self.narrow:
            # it was written before the step began, and something comes before its first product
            return lambda x, out: narrow_product_(x, weight, out, bias=bias, dependent=True)
        if bias is None:
            return lambda x, out: torch.mm(x, weight.t(), out=out)
        return lambda x, out: torch.addmm(bias, x, weight.t(), out=out)
