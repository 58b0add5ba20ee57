"""What a rank's local parameter is in model space: the same description serves the optimizer's
norms, the checkpoints and the converters.

A local parameter is a vector or a matrix. It is cut by rows into pieces: each piece is a rectangle
of one global tensor (a fused QKV matrix has three, a padded embedding one and a rest that belongs
to nothing). Global names and shapes never show fusing, padding or copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Rectangle:
    """A block of a global tensor: where it starts and how far it reaches, in each dimension."""

    start: tuple[int, ...]
    size: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Rows of a local parameter, from `first_row` on, that are a block of a global tensor."""

    name: str
    shape: tuple[int, ...]  # of the whole global tensor
    first_row: int
    block: Rectangle
    # Of the ranks that hold a block, exactly one counts it in norms and writes it to checkpoints.
    counts: bool = True
    # The gradient that one rank computes is a part: it is summed over these groups, by name
    # ("tp": norms under sequence parallel; "kv_copies"; "embedding": tied first and last stage).
    sum_over: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for length, start, size in zip(self.shape, self.block.start, self.block.size, strict=True):
            if not 0 <= start <= start + size <= length:
                raise ValueError(
                    f"{self.name}: the block {self.block} does not lie in the shape {self.shape}"
                )


@dataclass(frozen=True)
class ParameterInfo:
    """A local parameter's place in model space."""

    pieces: tuple[Piece, ...]
    weight_decay: bool


def flat_pieces(
    info: ParameterInfo, row_width: int, start: int, stop: int
) -> Iterator[tuple[Piece, int, Rectangle]]:
    """The parts of elements [start, stop) of a flattened parameter: (piece, flat offset, block).

    A flat range of a row-major block is at most three rectangles: the rest of a row, whole rows,
    the beginning of a row. `row_width` is the number of elements of one local row.
    """
    for piece in info.pieces:
        first = piece.first_row * row_width
        low = max(start, first)
        high = min(stop, first + prod(piece.block.size))
        while low < high:
            row, column = divmod(low - first, row_width)
            if column or high - low < row_width:
                rows, columns = 1, min(row_width - column, high - low)
            else:
                rows, columns = (high - low) // row_width, row_width
            dimensions = len(piece.shape)  # of a vector only the rows are left
            offsets = (row, column)[:dimensions]
            block = Rectangle(
                tuple(a + b for a, b in zip(piece.block.start, offsets, strict=True)),
                (rows, columns)[:dimensions],
            )
            yield piece, low, block
            low += rows * columns
