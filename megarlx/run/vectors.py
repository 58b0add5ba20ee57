"""What is added in a sum of weights: a checkpoint, its difference from another, or a control.

A control is like this difference, and is not it:

    permuted:SEED   each layer gets the difference of another layer of equal shapes
    random:SEED     each tensor gets normal numbers with the norm of its difference
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megarlx.data.order import key_of, shuffled
from megarlx.hf.sources import CheckpointSource, parts
from megarlx.run.directory import RunError

CHANGE = re.compile(r"(permuted|random):(\d{1,18})")
OF_LAYER = re.compile(r"(layers)\.(\d+)\.(.+)")


class Vector(Protocol):
    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        """A block of it, in fp64."""
        ...


class Difference:
    """plus − minus, or plus where there is no other."""

    def __init__(self, plus: CheckpointSource, minus: CheckpointSource | None) -> None:
        self.plus, self.minus = plus, minus

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        values = self.plus.read(name, start, size).double()
        return (
            values if self.minus is None else values - self.minus.read(name, start, size).double()
        )


class Permuted:
    def __init__(self, of: Difference, shapes: Mapping[str, tuple[int, ...]], seed: int) -> None:
        self.of, self._taken = of, permutation(shapes, seed)

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        if (match := OF_LAYER.fullmatch(name)) is not None:
            name = f"{match[1]}.{self._taken[int(match[2])]}.{match[3]}"
        return self.of.read(name, start, size)


def permutation(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[int, int]:
    """Layer -> another one of equal shapes, each taken once; itself where there is no other."""
    held: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if (match := OF_LAYER.fullmatch(name)) is not None:
            held.setdefault(int(match[2]), {})[match[3]] = shape
    alike: dict[tuple[tuple[str, tuple[int, ...]], ...], list[int]] = {}
    for layer, inside in sorted(held.items()):
        alike.setdefault(tuple(sorted(inside.items())), []).append(layer)
    found: dict[int, int] = {}
    for layers in alike.values():
        order = [layers[int(i)] for i in shuffled(len(layers), key_of(seed, "permuted layers"))]
        found |= dict(zip(order, [*order[1:], order[0]], strict=True))
    return found


class RandomAlike:
    """The same numbers for every block that is asked for, whatever the layout."""

    def __init__(self, of: Difference, shapes: Mapping[str, tuple[int, ...]], seed: int) -> None:
        self.of, self.shapes, self.seed = of, shapes, seed
        self._factors: dict[str, float] = {}

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        if name not in self._factors:
            self._factors[name] = self._factor(name)
        return self._factors[name] * self._normal(name, start, size)

    def _normal(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        """Row by row, each with a generator of its own."""
        shape = self.shapes[name]
        if not shape:
            return self._row(name, 0, ())
        inner = tuple(slice(low, low + n) for low, n in zip(start[1:], size[1:], strict=True))
        rows = range(start[0], start[0] + size[0])
        return torch.stack([self._row(name, row, shape[1:])[inner] for row in rows])

    def _row(self, name: str, row: int, shape: tuple[int, ...]) -> Tensor:
        draw = np.random.Generator(np.random.Philox(key_of(self.seed, "random vector", name, row)))
        return torch.from_numpy(np.asarray(draw.standard_normal(shape)))

    def _factor(self, name: str) -> float:
        shape = self.shapes[name]
        squares = [0.0, 0.0]
        for start, size in parts(shape, (0,) * len(shape), shape):
            for at, values in enumerate(
                (self.of.read(name, start, size), self._normal(name, start, size))
            ):
                squares[at] += float((values * values).sum())
        return math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0


def vector_of(
    plus: CheckpointSource,
    minus: CheckpointSource | None,
    shapes: Mapping[str, tuple[int, ...]],
    change: str | None,
) -> Vector:
    of = Difference(plus, minus)
    if change is None:
        return of
    kind, seed = parsed(change)
    return (Permuted if kind == "permuted" else RandomAlike)(of, shapes, seed)


def parsed(change: str) -> tuple[str, int]:
    match = CHANGE.fullmatch(change)
    if match is None:
        raise RunError(f"--change is {change!r}; allowed are permuted:SEED and random:SEED")
    return match[1], int(match[2])
