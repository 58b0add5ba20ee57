"""What a training sample is, and the order of one source's samples.

Letters: S sequence_length.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megarlx.data.held_tokens import HeldTokens
from megarlx.data.native import index as _index
from megarlx.data.order import key_of
from megarlx.data.token_files import TokenFile

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """One sequence: each input predicts the target at the same place."""

    inputs: Integers  # [S]
    targets: Integers  # [S]
    mask: npt.NDArray[np.bool_] | None  # [S], which targets count; None: all
    document_lengths: tuple[int, ...]  # add up to S; no token should see another document
    source: int


class Dataset(Protocol):
    """An endless row of samples. A sample is its global index: any rank can make any of them."""

    sequence_length: int

    def sample(self, index: int) -> Sample: ...

    def fingerprint(self) -> dict[str, object]: ...

    def tokens_by_source(self, consumed_sequences: int) -> dict[str, int]: ...


class SourceEpoch:
    """One pass over a source: its documents in a fresh order, one after the other, cut into
    samples of S + 1 tokens that overlap by one, and these in a fresh order again. The rest at the
    end (fewer than S + 1) is left out; the next epoch, in another order, leaves out another.

    Held in memory: 12 bytes a sample. The orders are computed, not stored, and nothing is written
    to a disk that another node might not see.
    """

    def __init__(self, lengths: npt.NDArray[np.int32], sequence_length: int, key: int) -> None:
        self._lengths, self._key, self._take = lengths, key, sequence_length + 1
        self._positions, self._offsets = _index.sample_index(
            lengths, sequence_length, epochs=1, seed=key
        )
        self.samples = len(self._offsets) - 1
        self._samples_key = key_of(key, "samples")

    def pieces(self, number: int) -> list[tuple[int, int, int]]:
        """(document, first token in it, count) of sample `number` of this epoch."""
        if not 0 <= number < self.samples:
            raise IndexError(f"sample {number} of an epoch; allowed 0 to {self.samples - 1}")
        at = np.array([number], np.int64)
        place = int(_index.permute(at, self.samples, seed=self._samples_key)[0])
        first, last = int(self._positions[place]), int(self._positions[place + 1])
        positions = np.arange(first, last + 1)
        documents = _index.documents_at(positions, len(self._lengths), seed=self._key)
        left, begin, found = self._take, int(self._offsets[place]), []
        lengths = self._lengths[documents].tolist()
        for document, length in zip(documents.tolist(), lengths, strict=True):
            count = min(left, length - begin)
            if count:  # a document may be empty
                found.append((document, begin, count))
                left -= count
            begin = 0
        return found


def samples_in(tokens: int, sequence_length: int) -> int:
    return max(0, tokens - 1) // sequence_length


class TokenSource:
    """The samples of one token file, epoch after epoch."""

    def __init__(
        self, name: str, file: TokenFile | HeldTokens, sequence_length: int, seed: int
    ) -> None:
        self.name, self.file, self.sequence_length = name, file, sequence_length
        self._seed = seed
        self._lengths = file.document_lengths()
        self._bounds = file.document_bounds()
        self._epochs: dict[int, SourceEpoch] = {}
        self._lock = threading.Lock()
        self.samples_per_epoch = samples_in(file.tokens, sequence_length)
        if self.samples_per_epoch == 0:
            raise ValueError(
                f"source '{name}' ({file.prefix}): has {file.tokens} tokens; one sample of "
                f"sequence_length {sequence_length} needs {sequence_length + 1}"
            )

    @cached_property
    def fingerprint(self) -> dict[str, int | str]:
        return self.file.fingerprint()

    def epoch(self, number: int) -> SourceEpoch:
        with self._lock:
            if number not in self._epochs:
                # Samples are asked for in order: the epoch before is the only other one needed.
                for old in [n for n in self._epochs if n < number - 1 or n > number]:
                    del self._epochs[old]
                key = key_of(self._seed, self.name, number)
                self._epochs[number] = SourceEpoch(self._lengths, self.sequence_length, key)
            return self._epochs[number]

    def read(self, number: int, source: int) -> Sample:
        """Sample `number` of this source, counted over all epochs."""
        epoch, position = divmod(number, self.samples_per_epoch)
        tokens = np.empty(self.sequence_length + 1, np.int64)
        lengths, at, raw = [], 0, self.file.raw
        pieces = self.epoch(epoch).pieces(position)
        for document, first, count in pieces:
            begin = int(self._bounds[document]) + first
            tokens[at : at + count] = raw[begin : begin + count]
            at += count
            lengths.append(count)
        if not self.file.ids_are_valid(tokens):  # once for all pieces; then the one to blame
            for document, first, count in pieces:
                begin = int(self._bounds[document]) + first
                self.file.check_ids(raw[begin : begin + count], begin)
        # The last token is only ever a target: it takes no place among the inputs.
        lengths[-1] -= 1
        if lengths[-1] == 0:
            lengths.pop()
        return Sample(tokens[:-1], tokens[1:], None, tuple(lengths), source)
