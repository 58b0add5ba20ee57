"""Initial weights drawn on the card: on a CPU those of a model of 1.5e9 parameters take seconds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from megarlx.model import initialise


@contextlib.contextmanager
def drawn_on(device: torch.device) -> Iterator[None]:
    """Models built inside get other weights than their seed means, of the same distribution.

    A speed does not ask which. On a CPU nothing is changed.
    """

    def draw(name: str, shape: tuple[int, ...], *, seed: int, std: float) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape, device=device)
        if name.endswith(".bias"):
            return torch.zeros(shape, device=device)
        return torch.randn(shape, device=device).mul_(std)

    with contextlib.ExitStack() as stack:
        if device.type != "cpu":
            stack.enter_context(mock.patch.object(initialise, "draw", draw))
        yield
