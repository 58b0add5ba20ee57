"""Several sources in given shares that may change as training goes on.

Which source gives sample i is read off one fixed sequence: u(i) = i · φ mod 1 (φ the golden ratio,
as a 64-bit integer) falls into one of the intervals that the weights cut [0, 1) into. No other
sequence of multiples is spread more evenly: after n samples each source is within a few samples of
its share, whatever n. There is no index to build, to store or to share between nodes: only the
counts at every 16,384th sample are remembered, as far as training has come.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megarlx.data.samples import Sample, TokenSource

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd
BLOCK = 1 << 14
BLOCKS_KEPT = 4


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
        self._starts = [-(-part.from_tokens // self.sequence_length) for part in schedule]
        self._edges = [_edges([part.weights.get(n, 0.0) for n in names]) for part in schedule]
        self._counts: list[npt.NDArray[np.int64]] = [np.zeros(len(names), np.int64)]
        self._blocks: OrderedDict[int, npt.NDArray[np.uint16]] = OrderedDict()

    def _block(self, number: int) -> npt.NDArray[np.uint16]:
        """The sources of samples [number · BLOCK, (number + 1) · BLOCK)."""
        if (kept := self._blocks.get(number)) is not None:
            return kept
        index = np.arange(number * BLOCK, (number + 1) * BLOCK, dtype=np.uint64)
        with np.errstate(over="ignore"):
            places = index * np.uint64(GOLDEN)
        found = np.empty(BLOCK, np.uint16)
        for at, (start, edges) in enumerate(zip(self._starts, self._edges, strict=True)):
            last = at + 1 == len(self._starts)
            part = slice(
                max(0, start - number * BLOCK),
                BLOCK if last else max(0, self._starts[at + 1] - number * BLOCK),
            )
            found[part] = np.searchsorted(edges, places[part], side="right")
        self._blocks[number] = found
        while len(self._blocks) > BLOCKS_KEPT:
            self._blocks.popitem(last=False)
        return found

    def _counts_before(self, block: int) -> npt.NDArray[np.int64]:
        while len(self._counts) <= block:
            found = self._block(len(self._counts) - 1)
            counted = np.bincount(found, minlength=len(self.sources))
            self._counts.append(self._counts[-1] + counted)
        return self._counts[block]

    def locate(self, index: int) -> tuple[int, int]:
        """(source, which of its samples, counted over all epochs) of global sample `index`."""
        if index < 0:
            raise IndexError(f"blend: sample {index}; they are counted from 0")
        block, at = divmod(index, BLOCK)
        before, found = self._counts_before(block), self._block(block)
        source = int(found[at])
        return source, int(before[source]) + int(np.count_nonzero(found[:at] == source))

    def sample(self, index: int) -> Sample:
        source, number = self.locate(index)
        return self.sources[source].read(number, source)

    def samples_by_source(self, consumed_sequences: int) -> dict[str, int]:
        block, at = divmod(consumed_sequences, BLOCK)
        counts = self._counts_before(block)
        counts = counts + np.bincount(self._block(block)[:at], minlength=len(self.sources))
        return {s.name: int(n) for s, n in zip(self.sources, counts, strict=True)}

    def tokens_by_source(self, consumed_sequences: int) -> dict[str, int]:
        counts = self.samples_by_source(consumed_sequences)
        return {name: n * self.sequence_length for name, n in counts.items()}

    def epochs_by_source(self, consumed_sequences: int) -> dict[str, float]:
        """How often each source was gone through."""
        counts = self.samples_by_source(consumed_sequences)
        return {s.name: counts[s.name] / s.samples_per_epoch for s in self.sources}

    def fingerprint(self) -> dict[str, object]:
        """What must be the same after a resume for the order to go on as it was."""
        return {
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "schedule": [[p.from_tokens, dict(sorted(p.weights.items()))] for p in self.schedule],
            "sources": {source.name: source.fingerprint for source in self.sources},
        }


def _edges(weights: Sequence[float]) -> npt.NDArray[np.uint64]:
    """Upper ends of all intervals but the last, on the scale of 2^64. A weight of 0 is an interval
    of no length, at the end too."""
    last = max(i for i, weight in enumerate(weights) if weight > 0)
    total, running, edges = math.fsum(weights), 0.0, []
    for i, weight in enumerate(weights[:-1]):
        running += weight
        edge = (1 << 64) - 1 if i >= last else int(running / total * 2.0**64)
        edges.append(min(edge, (1 << 64) - 1))
    return np.array(edges, np.uint64)
