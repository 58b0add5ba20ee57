"""Random order without state: everything is a pure function of a key and a number.

Nothing here depends on a library's generator, whose stream may change with its version: a run must
find the same order years later.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BITS = (1 << 64) - 1
Numbers = npt.NDArray[np.uint64]
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(x: int) -> int:
    """The finisher of SplitMix64: every bit of the result depends on every bit of x."""
    x = (x + _STEP) & BITS
    x = ((x ^ (x >> 30)) * _FIRST) & BITS
    x = ((x ^ (x >> 27)) * _SECOND) & BITS
    return x ^ (x >> 31)


def mix_array(x: Numbers) -> Numbers:
    with np.errstate(over="ignore"):  # the wrap-around is wanted
        x = x + np.uint64(_STEP)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
    return x ^ (x >> np.uint64(31))


def key_of(*parts: int | str) -> int:
    """One 64-bit key from a seed, names and numbers."""
    key = 0
    for part in parts:
        if isinstance(part, str):
            part = int.from_bytes(hashlib.sha256(part.encode()).digest()[:8], "little")
        key = mix(key ^ mix(part & BITS))
    return key


def uniform(*parts: int | str) -> float:
    """A number in [0, 1) that belongs to these parts."""
    return (key_of(*parts) >> 11) / (1 << 53)


def shuffled(count: int, key: int) -> npt.NDArray[np.int64]:
    """The numbers 0 to count - 1 in the order of this key."""
    hashes = mix_array(np.arange(count, dtype=np.uint64) ^ np.uint64(key))
    return np.argsort(hashes, kind="stable")


@dataclass(frozen=True)
class Shuffle:
    """The same idea without the array: position → number, a permutation of 0 to count - 1.

    A four-round Feistel network on the next power of four; what falls outside is sent through
    again until it lands inside.
    """

    count: int
    key: int

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self.count:
            raise IndexError(f"shuffle: position {position}; allowed 0 to {self.count - 1}")
        half = max(1, ((self.count - 1).bit_length() + 1) // 2)
        low = (1 << half) - 1
        number = position
        while True:
            left, right = number >> half, number & low
            for turn in range(4):
                left, right = right, left ^ (mix(right ^ mix(self.key + turn)) & low)
            number = left << half | right
            if number < self.count:
                return number
