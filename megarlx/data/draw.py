"""A stream of random choices that belongs to a key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

from megarlx.data.order import BITS, key_of, mix

Split = Literal["train", "validation", "test", "compositions"]
T = TypeVar("T")


class Draw:
    def __init__(self, *parts: int | str) -> None:
        self._state = key_of(*parts)

    def bits(self) -> int:
        self._state = (self._state + 0x9E3779B97F4A7C15) & BITS
        return mix(self._state)

    def uniform(self) -> float:
        return (self.bits() >> 11) / (1 << 53)

    def below(self, count: int) -> int:
        return self.bits() * count >> 64

    def between(self, first: int, last: int) -> int:
        return first + self.below(last - first + 1)

    def one(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """Different items in random order."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(count)]

    def weighted(self, items: Sequence[T], shares: Sequence[float]) -> T:
        place = self.uniform() * sum(shares)
        chosen = None
        for item, share in zip(items, shares, strict=True):
            if share > 0:
                chosen = item
                place -= share
                if place < 0:
                    break
        assert chosen is not None, "no share is above 0"
        return chosen

    def share(self, shares: Sequence[tuple[str, float]]) -> str:
        return self.weighted([name for name, _ in shares], [share for _, share in shares])
