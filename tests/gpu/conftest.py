"""The fixture `card`: the GPU, or where there is none the emulated CUDA kernels."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

# Before a test uses cuDNN: beside another one on the machine it could not be imported after that.
if torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None:
    importlib.import_module("transformer_engine.pytorch")


@dataclass
class Card:
    """`with card:` runs the CUDA kernels on tensors that `on_card` has moved.

    The emulated card's memory is the CPU's: there the same ops run the CPU's kernels outside of it.
    """

    device: str
    kernels: contextlib.AbstractContextManager[None]
    emulated: bool = False

    def __enter__(self) -> None:
        self.kernels.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.kernels.__exit__(*error)

    def size(self, whole: int, emulated: int) -> int:
        """A number of rows or the like: small where a row takes a millisecond."""
        return emulated if self.emulated else whole

    def moved(self, value: Any) -> Any:
        """A copy of a tensor, or of all tensors of a list or dictionary, on the card."""
        if isinstance(value, torch.Tensor):
            return value.to(self.device, copy=True)
        if isinstance(value, list):
            return [self.moved(item) for item in value]
        if isinstance(value, dict):
            return {name: self.moved(item) for name, item in value.items()}
        return value


@pytest.fixture
def card(request: pytest.FixtureRequest) -> Iterator[Card]:
    if torch.cuda.is_available():
        yield Card("cuda", contextlib.nullcontext())
    elif request.config.pluginmanager.has_plugin("cuda_emulation.plugin"):
        kernels = request.getfixturevalue("emulated_kernels")
        yield Card("cpu", kernels, emulated=True)
    else:
        pytest.skip("no CUDA device (`make cuda-emulate` runs it on emulated kernels)")


@pytest.fixture
def on_card(card: Card) -> Iterator[Card]:
    """The whole test runs on the card."""
    with card:
        yield card
