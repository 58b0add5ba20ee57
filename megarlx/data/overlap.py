"""Which runs of tokens of a test stand in training text too.

Letters: n tokens of a run, G different runs of all questions, T tokens of a token file.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megarlx.data.token_files import TokenFile

RUN_TOKENS = 13
TOKENS_AT_ONCE = 1 << 20
FACTOR = np.uint64(0x9E3779B97F4A7C15)
FILTER_BITS = 22  # of a hash that are looked up before the whole of it is

Hashes = npt.NDArray[np.uint64]


class Runs:
    """The runs of n tokens of questions; questions shorter than that have none."""

    def __init__(self, questions: Sequence[Sequence[int]], tokens: int = RUN_TOKENS) -> None:
        if tokens < 1:
            raise ValueError(f"a run has {tokens} tokens; it must have at least 1")
        self.tokens = tokens
        every = [np.asarray(ids, np.int64) for ids in questions]
        windows = [_windows(ids, tokens) for ids in every]
        together = np.concatenate([np.empty((0, tokens), np.int64), *windows])
        self._runs, place = np.unique(together, axis=0, return_inverse=True)  # [G, n]
        bounds = np.cumsum([len(one) for one in windows])[:-1]
        self.of_question = np.split(place.reshape(-1), bounds) if windows else []
        hashes = _hashes(self._runs.reshape(-1), tokens)[::tokens] if len(self._runs) else _none()
        self._order = np.argsort(hashes)
        self._sorted = hashes[self._order]
        self._near = np.zeros(1 << FILTER_BITS, bool)
        self._near[_short(hashes)] = True

    def counted_in(self, file: TokenFile) -> npt.NDArray[np.int64]:
        """How often each run stands in a token file: [G]."""
        counts = np.zeros(len(self._runs), np.int64)
        for first in range(0, file.tokens - self.tokens + 1, TOKENS_AT_ONCE):
            last = first + TOKENS_AT_ONCE + self.tokens - 1
            counts += self._counted(np.asarray(file.raw[first:last], np.int64))
        return counts

    def _counted(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        hashes = _hashes(ids, self.tokens)
        likely = np.flatnonzero(self._near[_short(hashes)])
        place = np.searchsorted(self._sorted, hashes[likely])
        place = self._order[place.clip(max=max(0, len(self._sorted) - 1))]
        # A hash alone is not believed.
        same = (self._runs[place] == _windows(ids, self.tokens)[likely]).all(1)
        return np.bincount(place[same], minlength=len(self._runs))

    def shared(self, counts: npt.NDArray[np.int64]) -> list[int]:
        """Of each question, how many of its runs were counted."""
        return [int((counts[places] > 0).sum()) for places in self.of_question]


def _windows(ids: npt.NDArray[np.int64], tokens: int) -> npt.NDArray[np.int64]:
    if len(ids) < tokens:
        return np.empty((0, tokens), np.int64)
    return np.lib.stride_tricks.sliding_window_view(ids, tokens)


def _hashes(ids: npt.NDArray[np.int64], tokens: int) -> Hashes:
    """Of the run that begins at each place: Σ (id + 1) · factor^k, modulo 2^64."""
    count = len(ids) - tokens + 1
    if count < 1:
        return _none()
    values = ids.astype(np.uint64) + np.uint64(1)
    found = np.zeros(count, np.uint64)
    for k in range(tokens):
        found = found * FACTOR + values[k : k + count]
    return found


def _short(hashes: Hashes) -> Hashes:
    return hashes >> np.uint64(64 - FILTER_BITS)


def _none() -> Hashes:
    return np.empty(0, np.uint64)
