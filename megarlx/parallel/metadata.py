"""What a rank's local parameter is in model space: one description for the optimizer's norms, the
checkpoints and the converters.

Model space has one tensor a projection, with no padding and no copies. A process holds parameters
that are slices of those tensors, several fused into one. A `Piece` ties a range of a parameter to
a range of a tensor; `flat_pieces` does so for a range of a flattened parameter, which is what a
shard of the optimizer holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from megarlx.comm import collectives
from megarlx.comm.groups import Group


@dataclass(frozen=True)
class Rectangle:
    """A block of a global tensor: where it starts and how far it reaches, in each dimension."""

    start: tuple[int, ...]
    size: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """`parameter.narrow(dim, start, size)` holds `tensor.narrow(dim, offset, size)`."""

    name: str  # of the global tensor
    global_shape: tuple[int, ...]
    dim: int  # the dimension that tensor parallelism splits (0 where it splits none)
    start: int
    offset: int
    size: int
    replicated_over: tuple[int, ...]  # tensor-parallel ranks that hold this piece, this one too
    sum_gradients: bool  # each copy's gradient is a part: the sum over the copies is the gradient
    counts_in_norm: bool  # exactly one copy does

    @property
    def is_split(self) -> bool:
        return self.size != self.global_shape[self.dim]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.global_shape[: self.dim], self.size, *self.global_shape[self.dim + 1 :])

    def of_parameter(self, parameter: Tensor) -> Tensor:
        """The piece as a view of the local parameter, or of anything of its shape."""
        return parameter.narrow(self.dim, self.start, self.size)

    def of_tensor(self, tensor: Tensor) -> Tensor:
        """The piece as a view of the global tensor."""
        return tensor.narrow(self.dim, self.offset, self.size)


@dataclass(frozen=True)
class ParameterLayout:
    """A local parameter: its pieces in order; what no piece covers is vocabulary padding."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    weight_decay: bool  # matrices yes, norms and biases no
    tied: bool = False  # first and last pipeline stage each hold it: their gradients are summed


def flat_pieces(
    layout: ParameterLayout, start: int, stop: int
) -> Iterator[tuple[Piece, int, Rectangle]]:
    """The parts of elements [start, stop) of a flattened parameter: (piece, flat offset, block).

    A flat range of a row-major block is at most three rectangles: the rest of a row, whole rows,
    the beginning of a row. A piece is a run of whole local rows (where `dim` is 1, all of them).
    """
    width = prod(layout.shape[1:])
    for piece in layout.pieces:
        first_row = piece.start if piece.dim == 0 else 0
        low = max(start, first_row * width)
        high = min(stop, first_row * width + prod(piece.shape))
        while low < high:
            row, column = divmod(low - first_row * width, width)
            if column or high - low < width:
                rows, columns = 1, min(width - column, high - low)
            else:
                rows, columns = (high - low) // width, width
            at = [row, column]
            at[piece.dim] += piece.offset
            dimensions = len(piece.global_shape)  # of a vector only the rows are left
            yield piece, low, Rectangle(tuple(at[:dimensions]), (rows, columns)[:dimensions])
            low += rows * columns


def sum_partial_gradients_(
    layouts: Mapping[str, ParameterLayout], gradients: Mapping[str, Tensor], group: Group
) -> None:
    """Sum the gradients of pieces that several tensor-parallel ranks hold a part of, in place.

    One all-reduce for all of them. Key/value heads are held by a few ranks only: each set of
    holders has its own places in what is sent, and leaves the other places zero, so the sum is
    exact, the same on every holder, and needs no group of its own.
    """
    if group.size == 1:
        return
    parts: list[tuple[Tensor, int, int]] = []  # the gradient, its set of holders, how many sets
    for name in sorted(gradients):
        for piece in layouts[name].pieces:
            if piece.sum_gradients:
                sets = group.size // len(piece.replicated_over)
                mine = group.rank // len(piece.replicated_over)
                parts.append((piece.of_parameter(gradients[name]), mine, sets))
    for dtype in sorted({part.dtype for part, _, _ in parts}, key=str):
        same = [p for p in parts if p[0].dtype == dtype]
        total = sum(part.numel() * sets for part, _, sets in same)
        buffer = torch.zeros(total, dtype=dtype, device=same[0][0].device)
        places, begin = [], 0
        for part, mine, sets in same:
            place = buffer[begin + mine * part.numel() :][: part.numel()].view(part.shape)
            places.append(place.copy_(part))
            begin += part.numel() * sets
        collectives.all_reduce_(buffer, group)
        for (part, _, _), place in zip(same, places, strict=True):
            part.copy_(place)


@torch.no_grad()
def fill_(
    parameters: Mapping[str, Tensor],
    layouts: Mapping[str, ParameterLayout],
    tensor_of: Callable[[Piece], Tensor],
) -> None:
    """Copy slices of global tensors into local parameters; vocabulary padding becomes zero."""
    for name, parameter in parameters.items():
        parameter.zero_()
        for piece in layouts[name].pieces:
            tensor = tensor_of(piece)
            if tuple(tensor.shape) != piece.global_shape:
                raise ValueError(
                    f"{piece.name} has shape {tuple(tensor.shape)}; the model's is "
                    f"{piece.global_shape}"
                )
            piece.of_parameter(parameter).copy_(piece.of_tensor(tensor))
