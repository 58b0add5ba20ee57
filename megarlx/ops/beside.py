"""Work beside what a stream does next: a chunk's loss beside the next chunk's product.

csrc/beside.h is the same for the loop in C++.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

Result = TypeVar("Result")


class Order(Protocol):
    """When begun work is done."""

    parts: int  # of a chunk: with two, one's loss is under way beside the next one's product

    def begin(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """`work` comes behind all that was launched so far. What is launched after a call of the
        answer comes behind the work, whose result that call returns."""
        ...


class InTurn:
    """On the stream itself, at once."""

    parts = 1

    def begin(self, work: Callable[[], Result]) -> Callable[[], Result]:
        result = work()
        return lambda: result


class Beside:
    """On a second stream. A graph that is being captured takes both in."""

    parts = 2

    def __init__(self, device: torch.device) -> None:
        self.main, self.second = torch.cuda.current_stream(device), _second(device)

    def begin(self, work: Callable[[], Result]) -> Callable[[], Result]:
        self.second.wait_stream(self.main)
        with torch.cuda.stream(self.second):
            result = work()
        ended = self.second.record_event()

        def joined() -> Result:
            self.main.wait_event(ended)
            return result

        return joined


@functools.cache
def _second(device: torch.device) -> torch.cuda.Stream:
    """One for each device: a new one could not be had while a graph is captured."""
    return torch.cuda.Stream(device)


@contextmanager
def order(hidden: torch.Tensor, rows: int) -> Iterator[Order]:
    """For chunks of so many hidden rows; all works that were begun are to be joined inside.

    Beside only in bf16 on CUDA: elsewhere gradients take their logits' places, which the next
    product would need, and products are so slow that the loss beside them is nothing.
    """
    device, several = hidden.device, len(hidden) > rows > 1
    if device.type != "cuda" or hidden.dtype != torch.bfloat16 or not several:
        yield InTurn()
        return
    beside = Beside(device)
    try:
        yield beside
    except BaseException:  # what frees tensors now would give them to the first stream
        beside.main.wait_stream(beside.second)
        raise
