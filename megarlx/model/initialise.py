"""Initial weights that are the same numbers whatever the layout.

Every global tensor is drawn whole from a generator of its own, keyed by (seed, global name), and
each process keeps its slice. One tensor at a time is held; the draw is on the CPU in fp32, so it
depends neither on the device nor on the dtype trained in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from megarlx.parallel.metadata import ParameterLayout, fill_


def draw(name: str, shape: tuple[int, ...], *, seed: int, std: float, norms: float = 1.0) -> Tensor:
    """The initial value of one global tensor: `norms`, biases 0, matrices normal."""
    if name.endswith("norm.weight"):
        return torch.full(shape, norms)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    key = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    # torch takes any 64-bit seed; one bit less keeps it a positive int64 everywhere
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def initialise_(
    parameters: Mapping[str, Tensor],
    layouts: Mapping[str, ParameterLayout],
    *,
    seed: int,
    std: float,
    norms: float = 1.0,
) -> None:
    """Fill local parameters with their slices of what `seed` means for the whole model.

    On the meta device there is nothing to fill, and a model of any size costs nothing.
    """
    if all(parameter.is_meta for parameter in parameters.values()):
        return
    fill_(
        parameters,
        layouts,
        lambda p: draw(p.name, p.global_shape, seed=seed, std=std, norms=norms),
    )
