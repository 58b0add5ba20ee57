"""Operations that are looked up in place of calculated.

Step s of a problem (s from 1) uses an operation of slot s. It leads from each value of slot s - 1
to a value of a range that is its own, so that the operation and the value before it together say
what comes: no other operation leads there. Slot 0 is where problems start. How often an operation
occurs falls with its rank in its slot.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache
from itertools import islice
from typing import NamedTuple

from megarlx.data.draw import Draw
from megarlx.data.order import key_of, shuffled
from megarlx.study.world.facts import invented
from megarlx.study.world.often import asked_often
from megarlx.study.world.settings import Operation, WorldSettings


class Lookup(NamedTuple):
    """What has to be known for a step: a fact of the world."""

    operation: int  # counted through the slots, in each the most frequent one first
    value: int  # before the step


class Tables:
    def __init__(self, settings: WorldSettings) -> None:
        self.settings = settings
        self.in_slot = settings.tables * settings.table_values  # values of one slot
        self.weights = tuple(rank**-settings.table_skew for rank in range(1, settings.tables + 1))
        self._results: dict[Lookup, int] = {}  # that were asked for
        words = invented(settings.seed, "operations", settings.slots * settings.tables, 2, "m")
        self.operations = tuple(
            Operation("table", (word,), self.weights[i % settings.tables])
            for i, word in enumerate(words)
        )

    @property
    def values(self) -> int:
        """All numbers are 0 up to this, without it."""
        return (self.settings.slots + 1) * self.in_slot

    def __len__(self) -> int:
        return len(self.operations) * self.in_slot

    def number(self, at: Lookup) -> int:
        return at.operation * self.in_slot + at.value - self._first_input(at.operation)

    def __getitem__(self, number: int) -> Lookup:
        operation, place = divmod(number, self.in_slot)
        return Lookup(operation, self._first_input(operation) + place)

    def result(self, at: Lookup) -> int:
        if at not in self._results:
            place = self._key(at) % self.settings.table_values
            self._results[at] = self._value(at.operation, place)
        return self._results[at]

    def wrong(self, at: Lookup) -> int:
        """The wrong value that is told of it, always the same and of the operation's range."""
        count, key = self.settings.table_values, self._key(at)
        return self._value(at.operation, (key + 1 + (key >> 32) % (count - 1)) % count)

    def leading_to(self, value: int) -> int:
        """The operation whose value it is."""
        return (value - self.in_slot) // self.settings.table_values

    def start(self, draw: Draw) -> int:
        """The range by rank, evenly within."""
        rank = draw.weighted(range(self.settings.tables), self.weights)
        return rank * self.settings.table_values + draw.below(self.settings.table_values)

    def operation(self, draw: Draw, slot: int) -> int:
        rank = draw.weighted(range(self.settings.tables), self.weights)
        return (slot - 1) * self.settings.tables + rank

    @cached_property
    def withheld(self) -> frozenset[int]:
        """Numbers of the facts that no text tells and no ordinary question needs."""
        return frozenset(self._kept[: self.settings.withheld])

    @cached_property
    def told_wrongly(self) -> frozenset[int]:
        """Numbers of the facts that text always tells with their wrong value."""
        return frozenset(self._kept[self.settings.withheld :])

    @cached_property
    def _kept(self) -> list[int]:
        count = self.settings.withheld + self.settings.told_wrongly
        order = map(int, shuffled(len(self), key_of(self.settings.seed, "kept facts")))
        among: Iterator[int] = filter(self._may_be_kept, order)
        if self.settings.least_told:
            among = asked_often(self, among)
        return list(islice(among, count))

    def _may_be_kept(self, number: int) -> bool:
        """By the rank of the range that other facts of its questions share with it: that of the
        value it leads to in the first slot, of the value before it in later ones."""
        if not self.settings.kept_ranks:
            return True
        at = self[number]
        shared = self.result(at) if at.operation < self.settings.tables else at.value
        return shared % self.in_slot // self.settings.table_values < self.settings.kept_ranks

    def _key(self, at: Lookup) -> int:
        return key_of(self.settings.seed, "table", at.operation, at.value)

    def _value(self, operation: int, place: int) -> int:
        return self.in_slot + operation * self.settings.table_values + place

    def _first_input(self, operation: int) -> int:
        return operation // self.settings.tables * self.in_slot


@lru_cache(maxsize=8)
def tables_of(settings: WorldSettings) -> Tables:
    return Tables(settings)
