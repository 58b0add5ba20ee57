"""Rows rounded to e4m3, each with a scale: its largest number over e4m3's largest.

N rows of K columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megarlx.ops import native

native.load()

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3


def e4m3_rows_(x: Tensor, values: Tensor, scales: Tensor) -> None:
    """x [N, K] as nearly scales [N], fp32, times values [N, K], e4m3; all contiguous.

    x is fp32, fp64, and on CUDA bf16. NaN and infinity make their row's scale no finite number.
    """
    torch.ops.megarlx.e4m3_rows_(x, values, scales)


def e4m3_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """values and scales in plain torch."""
    wide = x.float()
    largest = wide.abs().amax(1) if x.shape[1] else wide.new_zeros(len(x))
    # a tensor: by a number, torch on CUDA multiplies with its reciprocal
    scales = torch.where(largest == 0, 1.0, largest / torch.full_like(largest, LARGEST))
    return (wide / scales[:, None]).to(E4M3), scales


@torch.library.register_fake("megarlx::e4m3_rows_")
def _(x: Tensor, values: Tensor, scales: Tensor) -> None:
    return None
