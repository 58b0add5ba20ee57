"""Initial weights that are the same numbers whatever the layout, the device and the dtype.

The numbers of a global tensor are keyed by (seed, its name, the element's index in it). Each rank
draws the slice that it holds, in place; a dtype narrower than fp32 rounds them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from megarlx.ops.normal import normal_slice_
from megarlx.parallel.metadata import ParameterLayout, Piece


def key_of(name: str, seed: int) -> int:
    """What the numbers of a global tensor hang on: 64 bits."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def draw_(part: Tensor, piece: Piece, *, seed: int, std: float, norms: float = 1.0) -> None:
    """The initial value of one piece: norms `norms`, biases 0, matrices normal."""
    if piece.name.endswith("norm.weight"):
        part.fill_(norms)
    elif piece.name.endswith(".bias"):
        part.zero_()
    else:
        width = prod(piece.global_shape[1:])
        first = piece.offset * (width if piece.dim == 0 else 1)
        normal_slice_(part, key=key_of(piece.name, seed), first=first, step=width, std=std)


@torch.no_grad()
def initialise_(
    parameters: Mapping[str, Tensor],
    layouts: Mapping[str, ParameterLayout],
    *,
    seed: int,
    std: float,
    norms: float = 1.0,
) -> None:
    """Fill local parameters with their slices of what `seed` means for the whole model.

    Vocabulary padding becomes 0. On the meta device there is nothing to fill, and a model of any
    size costs nothing.
    """
    for name, parameter in parameters.items():
        if parameter.is_meta:
            continue
        pieces = layouts[name].pieces
        if sum(prod(piece.shape) for piece in pieces) < parameter.numel():
            parameter.zero_()
        for piece in pieces:
            draw_(piece.of_parameter(parameter), piece, seed=seed, std=std, norms=norms)
