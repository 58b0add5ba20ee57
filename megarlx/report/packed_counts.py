"""Counts by question and names of questions, as short text."""

from __future__ import annotations

import zlib
from base64 import b85decode, b85encode
from collections.abc import Sequence
from typing import Any

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
PACKED = ":"  # before counts as bytes, compressed by zlib, in base 85
BITS = b"\xff"  # before bits; no count is so large


def packed(counts: Sequence[int]) -> int | str | list[int]:
    """One number where all are alike, else the shorter of a character each and of these packed;
    a list where a count has no character."""
    if len(set(counts)) == 1:
        return counts[0]
    if not counts or min(counts) < 0 or max(counts) >= len(DIGITS):
        return list(counts)
    plain = "".join(DIGITS[count] for count in counts)
    short = PACKED + b85encode(zlib.compress(_in_bytes(counts), 9)).decode()
    return short if len(short) < len(plain) else plain


def _in_bytes(counts: Sequence[int]) -> bytes:
    """Bits where all are 0 or 1."""
    if max(counts) > 1:
        return bytes(counts)
    bits = "".join(map(str, counts))
    return BITS + int(bits, 2).to_bytes(-(-len(counts) // 8), "big")


def counts_of(kept: int | str | list[int], length: int) -> list[int]:
    if isinstance(kept, int):
        return [kept] * length
    if isinstance(kept, list):
        return kept
    if not kept.startswith(PACKED):
        return [DIGITS.index(character) for character in kept]
    held = zlib.decompress(b85decode(kept.removeprefix(PACKED)))
    if not held.startswith(BITS):
        return list(held)
    return [int(bit) for bit in f"{int.from_bytes(held.removeprefix(BITS), 'big'):0{length}b}"]


def ids_in_short(names: Sequence[str]) -> list[Any]:
    """Names that are numbered from 0 as [what is before the number, how many]."""
    before = names[0].removesuffix("0")
    numbered = all(name == f"{before}{i}" for i, name in enumerate(names))
    return [before, len(names)] if numbered else list(names)


def ids_of(kept: Sequence[Any]) -> list[str]:
    if len(kept) == 2 and isinstance(kept[1], int):
        return [f"{kept[0]}{i}" for i in range(kept[1])]
    return list(kept)
