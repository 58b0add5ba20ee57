"""Batch heights for decoding, so that a row's bits do not depend on the other rows.

A row of a matrix product may differ in its last bits between products of different heights: the
library picks its kernel, and with it the order of its sums, by the shape. Heights that are
multiples of 16 mostly take the same kernel, and often 4 and 8 do too. `rows_agree` looks whether
they do on the device: then decoding runs at the narrowest width of the ladder that holds its rows.
Where they do not, an engine keeps to one width from beginning to end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

TILE = 16
NARROW = (4, 8)  # for the last rows of a batch, where they agree with the others


def ladder(rows: int) -> tuple[int, ...]:
    """16, 32, 48, 64, 96, 128, 192, 256, 384, … up to the first that holds `rows`."""
    if rows < 1:
        raise ValueError(f"generate: slots is {rows}; allowed: 1 or more")
    widths, step = [TILE], TILE
    while widths[-1] < rows:
        if widths[-1] == 4 * step:
            step *= 2
        widths.append(widths[-1] + step)
    return tuple(widths)


def narrowest(widths: Sequence[int], rows: int) -> int:
    return next(width for width in widths if width >= rows)


def rows_agree(weights: Iterable[Tensor], widths: Sequence[int]) -> bool:
    """Whether products of these heights with matrices of these shapes give a row the same bits."""
    tallest = max(widths)
    generator = torch.Generator().manual_seed(0)
    shapes = {(w.shape, w.dtype): w for w in weights if w.dim() == 2}
    for weight in shapes.values():
        columns = weight.shape[1]
        x = torch.randn(tallest, columns, generator=generator).to(weight.device, weight.dtype)
        whole = torch.mm(x, weight.t())
        if not all(torch.equal(torch.mm(x[:n], weight.t()), whole[:n]) for n in widths):
            return False
    return True
