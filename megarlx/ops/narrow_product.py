"""A product of few rows with a matrix that is read once: what a decode step of few samples is made
of.

On CUDA a row's bits depend on the row and the matrix alone, not on how many rows there are: all
take the same kernel, and the order of its sums follows from the number of columns. On a CPU it is
torch's product.

R rows, K columns, N outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megarlx.ops import native

native.load()

MOST_ROWS = 16


def narrow_product_(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    scales: Tensor | None = None,
    dependent: bool = False,
) -> None:
    """out [R, N] = x [R, K] weightᵀ + bias [N], R at most MOST_ROWS, all contiguous.

    fp32, fp64, and on CUDA bf16, summed in fp32 or better. With `scales`, fp32 [N], `weight` is
    e4m3 and stands for scales · weight; x is then bf16 on CUDA. A NaN there has a NaN scale.

    dependent   the weight, bias and scales stand since before the kernel before this one: on sm_90
                and later they are read while that one still runs
    """
    torch.ops.megarlx.narrow_product_(x, weight, bias, scales, dependent, out)


@torch.library.register_fake("megarlx::narrow_product_")
def _(x: Tensor, *arguments: object) -> None:
    return None
