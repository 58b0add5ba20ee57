"""Keys for everything that is drawn at random: pure functions of a seed, names and numbers.

Nothing here depends on a library's generator, whose stream may change with its version: a run must
find the same order years later.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from megarlx.data.native import index as _index

BITS = (1 << 64) - 1


def mix(x: int) -> int:
    """The finisher of SplitMix64: every bit of the result depends on every bit of x."""
    x = (x + 0x9E3779B97F4A7C15) & BITS
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & BITS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & BITS
    return x ^ (x >> 31)


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
    return _index.permute(np.arange(count, dtype=np.int64), count, seed=key)
