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

    behind: int  # how many works may be begun before the first of them is joined

    def begin(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """`work` comes behind all that was launched so far. What is launched after a call of the
        answer comes behind the work, whose result that call returns."""
        ...


class InTurn:
    """On the stream itself, at once."""

    behind = 0

    def begin(self, work: Callable[[], Result]) -> Callable[[], Result]:
        result = work()
        return lambda: result


class Beside:
    """On a second stream. A graph that is being captured takes both in."""

    behind = 1

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
def order(device: torch.device, works: int) -> Iterator[Order]:
    """For so many works; all that were begun are to be joined inside."""
    if device.type != "cuda" or works < 2:
        yield InTurn()
        return
    beside = Beside(device)
    try:
        yield beside
    except BaseException:  # what frees tensors now would give them to the first stream
        beside.main.wait_stream(beside.second)
        raise
