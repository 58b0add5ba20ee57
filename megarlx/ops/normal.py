"""Normal numbers by a counter: any part of a tensor that nobody holds whole, on any device.

A key stands for an endless row of normal numbers, in fp32. Each is a function of (key, index) alone
and has the same bits on every CPU and GPU: csrc/math/normal.h.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megarlx.ops import native

native.load()


def normal_slice_(out: Tensor, *, key: int, first: int = 0, step: int = 0, std: float) -> None:
    """Element [r, c] of `out` becomes std times number first + r · step + c of the key's.

    `out` is [rows, columns], or one row [columns], in fp32, fp64 or bf16, with columns side by side
    in memory. `key` has 64 bits. Nothing waits for the device.
    """
    rows = out.unsqueeze(0) if out.dim() == 1 else out
    torch.ops.megarlx.normal_slice_(rows, key, first, step, std)


LANES = 16  # of a group of 64 numbers: csrc/math/normal.h


def normal_reference(indices: Tensor, key: int) -> Tensor:
    """The key's numbers at int64 `indices` [N], by the formula in fp64."""
    counters = indices // (4 * LANES) * LANES + indices % LANES
    words = torch.zeros(len(indices), 4, dtype=torch.int64)
    words[:, 0], words[:, 1] = counters & 0xFFFFFFFF, counters >> 32
    keys = torch.tensor([key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF])
    random = torch.ops.megarlx.philox(words, keys).double()
    quarter = indices // LANES % 4
    pairs = random.view(-1, 2, 2).gather(1, (quarter // 2).view(-1, 1, 1).expand(-1, 1, 2))[:, 0]
    radius = (-2 * ((pairs[:, 0] + 0.5) / 2**32).log()).sqrt()
    angle = 2 * math.pi * (pairs[:, 1] + 0.5) / 2**32
    return radius * torch.where(quarter % 2 == 0, angle.cos(), angle.sin())


@torch.library.register_fake("megarlx::normal_slice_")
def _(out: Tensor, key: int, first: int, step: int, std: float) -> None:
    return None
