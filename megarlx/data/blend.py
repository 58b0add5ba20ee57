"""Several sources in given shares that may change as training goes on.

Which source gives a sample is decided so that after any number of samples each source has had its
share to less than one sample (`megarlx._index.blend`). The order is computed block by block from
the counts at each block's start; nothing else is kept, so a run of any length needs little memory
and there is no index to write, to share between nodes or to go stale.
"""

from __future__ import annotations

import bisect
import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megarlx.data.native import index as _index
from megarlx.data.samples import Sample, TokenSource
from megarlx.data.token_files import TokenFile

BLOCK = 1 << 14  # samples
BLOCKS_KEPT = 4


# Sources and numbers of a block's samples.
Located = tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]


class BlendError(ValueError):
    """Weights or sources that do not go together."""


@dataclass(frozen=True)
class Composition:
    """The weights (they need not add up to 1) that hold from a number of consumed tokens on."""

    from_tokens: int
    weights: Mapping[str, float]


def check_schedule(schedule: Sequence[Composition], names: Sequence[str]) -> None:
    if not schedule or schedule[0].from_tokens != 0:
        first = schedule[0].from_tokens if schedule else "missing"
        raise BlendError(f"composition: the first from_tokens is {first}; it must be 0")
    for before, after in itertools.pairwise(schedule):
        if after.from_tokens <= before.from_tokens:
            raise BlendError(
                f"composition: from_tokens {after.from_tokens} comes after {before.from_tokens}; "
                "they must rise"
            )
    for part in schedule:
        if unknown := sorted(set(part.weights) - set(names)):
            raise BlendError(
                f"composition from {part.from_tokens} tokens: no source is called "
                f"{', '.join(unknown)}; there are {', '.join(names)}"
            )
        for name, weight in part.weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise BlendError(
                    f"composition from {part.from_tokens} tokens: weight of {name} is {weight}; "
                    "it must be a number of at least 0"
                )
        if not sum(part.weights.values()) > 0:
            raise BlendError(f"composition from {part.from_tokens} tokens: all weights are 0")


class _Part:
    """The order under one composition: it starts at global sample `start` and counts from there."""

    def __init__(self, weights: npt.NDArray[np.float64], start: int) -> None:
        self.weights, self.start = weights, start
        self._counts = [np.zeros(len(weights), np.int64)]  # at the start of each block seen so far

    def block(self, number: int) -> Located:
        return _index.blend(self.weights, BLOCK, served=self._counts_before(number))

    def _counts_before(self, block: int) -> npt.NDArray[np.int64]:
        while len(self._counts) <= block:
            self._counts.append(self._after(self._counts[-1], BLOCK))
        return self._counts[block]

    def _after(self, counts: npt.NDArray[np.int64], samples: int) -> npt.NDArray[np.int64]:
        sources, _ = _index.blend(self.weights, samples, served=counts)
        return counts + np.bincount(sources, minlength=len(counts))

    def counts(self, samples: int) -> npt.NDArray[np.int64]:
        """What each source gives in the first `samples` samples."""
        return self._after(self._counts_before(samples // BLOCK), samples % BLOCK)


class Blend:
    """The dataset of pre-training: sample i is a function of the sources, the schedule, the seed
    and i alone."""

    def __init__(
        self,
        sources: Sequence[TokenSource],
        schedule: Sequence[Composition],
        seed: int,
    ) -> None:
        names = [source.name for source in sources]
        if len(set(names)) != len(names) or not names:
            raise BlendError(
                f"sources are called {', '.join(names) or '(none)'}; names must differ"
            )
        lengths = {source.sequence_length for source in sources}
        if len(lengths) != 1:
            raise BlendError(f"sources have sequence lengths {sorted(lengths)}; they must agree")
        check_schedule(schedule, names)
        self.sources, self.schedule, self.seed = tuple(sources), tuple(schedule), seed
        self.sequence_length = lengths.pop()
        parts = [
            np.array([part.weights.get(name, 0.0) for name in names], np.float64)
            for part in schedule
        ]
        # A composition holds from the first sample that starts at or after its token count.
        starts = [-(-part.from_tokens // self.sequence_length) for part in schedule]
        self._parts = [
            _Part(w, a) for w, a, b in zip(parts, starts, [*starts[1:], -1], strict=True) if a != b
        ]
        # The prefetch thread reads samples while the training loop asks for counts.
        self._lock = threading.Lock()
        self._given = [np.zeros(len(names), np.int64)]  # before each part known so far
        self._blocks: OrderedDict[tuple[int, int], Located] = OrderedDict()

    def _part(self, index: int) -> tuple[int, int]:
        """(part of the schedule, place in it) of global sample `index`."""
        if index < 0:
            raise IndexError(f"blend: sample {index}; they are counted from 0")
        at = bisect.bisect_right(self._parts, index, key=lambda part: part.start) - 1
        return at, index - self._parts[at].start

    def _block(self, part: int, number: int) -> Located:
        if (kept := self._blocks.get((part, number))) is not None:
            return kept
        located = self._parts[part].block(number)
        self._blocks[part, number] = located
        while len(self._blocks) > BLOCKS_KEPT:
            self._blocks.popitem(last=False)
        return located

    def _before(self, part: int) -> npt.NDArray[np.int64]:
        """What each source has given before this part of the schedule."""
        while len(self._given) <= part:
            last = self._parts[len(self._given) - 1]
            length = self._parts[len(self._given)].start - last.start
            self._given.append(self._given[-1] + last.counts(length))
        return self._given[part]

    def locate(self, index: int) -> tuple[int, int]:
        """(source, which of its samples, counted over all epochs) of global sample `index`."""
        part, place = self._part(index)
        with self._lock:
            sources, numbers = self._block(part, place // BLOCK)
            before = self._before(part)
        source = int(sources[place % BLOCK])
        return source, int(before[source]) + int(numbers[place % BLOCK])

    def sample(self, index: int) -> Sample:
        source, number = self.locate(index)
        return self.sources[source].read(number, source)

    def samples_by_source(self, consumed_sequences: int) -> dict[str, int]:
        part, place = self._part(consumed_sequences)
        with self._lock:
            counts = self._before(part) + self._parts[part].counts(place)
        return {s.name: int(n) for s, n in zip(self.sources, counts, strict=True)}

    def tokens_by_source(self, consumed_sequences: int) -> dict[str, int]:
        counts = self.samples_by_source(consumed_sequences)
        return {name: n * self.sequence_length for name, n in counts.items()}

    def epochs_by_source(self, consumed_sequences: int) -> dict[str, float]:
        """How often each source was gone through."""
        counts = self.samples_by_source(consumed_sequences)
        return {s.name: counts[s.name] / s.samples_per_epoch for s in self.sources}

    @property
    def files(self) -> dict[str, str]:
        """Where each source lies, for error messages: a resumed run may have its data moved."""
        return {
            source.name: f"{source.file.prefix}.bin"
            if isinstance(source.file, TokenFile)
            else source.file.prefix
            for source in self.sources
        }

    def as_read(
        self, fingerprint: Mapping[str, Any], other: Mapping[str, Any], sequences: int
    ) -> dict[str, Any]:
        """What of a fingerprint the first `sequences` depend on, for a run that goes on.

        Parts of the schedule that begin later may be others, and a source may be added by them; of
        the sources that the `other` fingerprint has too, all must be the same.
        """
        tokens = sequences * self.sequence_length
        parts = [
            [begin, {name: weight for name, weight in weights.items() if weight > 0}]
            for begin, weights in fingerprint["schedule"]
            if begin < max(tokens, 1)
        ]
        read = {name for _, weights in parts for name in weights} | set(other["sources"])
        held = {name: one for name, one in fingerprint["sources"].items() if name in read}
        return {**fingerprint, "schedule": parts, "sources": held}

    def fingerprint(self) -> dict[str, object]:
        """What must be the same after a resume for the order to go on as it was."""
        return {
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "schedule": [[p.from_tokens, dict(sorted(p.weights.items()))] for p in self.schedule],
            "sources": {source.name: source.fingerprint for source in self.sources},
        }
