"""Operations that are looked up in place of calculated.

Step s of a problem (s from 1) uses an operation of slot s. It leads from each value of slot s - 1
to a value of a range that is its own, so that the operation and the value before it together say
what comes: no other operation leads there. Slot 0 is where problems start. How often an operation
occurs falls with its rank in its slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from itertools import islice
from typing import NamedTuple

from megarlx.data.draw import Draw
from megarlx.data.order import key_of, shuffled
from megarlx.study.world.facts import invented
from megarlx.study.world.settings import Operation, WorldSettings

# Where kept facts are to be asked of beside others that are told often: so many of these, and how
# often each is told, as a share of the problems that text tells.
LEAD, OFTEN = 2, 1 / 700


class Lookup(NamedTuple):
    """What has to be known for a step: a fact of the world."""

    operation: int  # counted through the slots, in each the most frequent one first
    value: int  # before the step


class Tables:
    def __init__(self, settings: WorldSettings) -> None:
        self.settings = settings
        self.in_slot = settings.tables * settings.table_values  # values of one slot
        self.weights = tuple(rank**-settings.table_skew for rank in range(1, settings.tables + 1))
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
        return self._value(at.operation, self._key(at) % self.settings.table_values)

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
            among = self._asked_often(among)
        return list(islice(among, count))

    def _asked_often(self, among: Iterable[int]) -> Iterator[int]:
        """Those beside which enough frequent facts stand that are not kept: beside rare ones, no
        question could be asked whose other facts are told often."""
        beside: dict[int, set[int]] = {}  # of each that was taken
        for number in among:
            own = self._frequent_beside(self[number]) - beside.keys()
            needed = [held for held in beside.values() if number in held]
            if len(own) < LEAD or any(len(held) <= LEAD for held in needed):
                continue
            for held in needed:
                held.discard(number)
            beside[number] = own
            yield number

    def _frequent_beside(self, at: Lookup) -> set[int]:
        """Facts that lead to its value; of the first slot, that its own value leads into."""
        tables = self.settings.tables
        if at.operation < tables:
            after = (Lookup(tables + rank, self.result(at)) for rank in range(tables))
            return {self.number(one) for one in after if self._share(one) >= OFTEN}
        first = self.leading_to(at.value) * self.in_slot
        before = (self[number] for number in range(first, first + self.in_slot))
        leading = (one for one in before if self._share(one) >= OFTEN)
        return {self.number(one) for one in leading if self.result(one) == at.value}

    def _share(self, at: Lookup) -> float:
        """How often text is expected to tell a fact, for each problem that it tells."""
        slot, rank = divmod(at.operation, self.settings.tables)
        steps = self.settings.steps
        drawn = self.weights[rank] / sum(self.weights) * self._value_shares[at.value]
        return sum(steps[slot:]) / sum(steps) * drawn

    @cached_property
    def _value_shares(self) -> list[float]:
        """How often each value is expected behind its slot: some are led to by few facts."""
        found = [0.0] * self.values
        for value in range(self.in_slot):
            rank = value // self.settings.table_values
            found[value] = self.weights[rank] / sum(self.weights) / self.settings.table_values
        for number in range(len(self)):  # slot by slot
            at = self[number]
            weight = self.weights[at.operation % self.settings.tables] / sum(self.weights)
            found[self.result(at)] += weight * found[at.value]
        return found

    def _may_be_kept(self, number: int) -> bool:
        """By the ranks of its operation and of the range of its value."""
        if not self.settings.kept_ranks:
            return True
        at = self[number]
        of_value = at.value % self.in_slot // self.settings.table_values
        return max(at.operation % self.settings.tables, of_value) < self.settings.kept_ranks

    def _key(self, at: Lookup) -> int:
        return key_of(self.settings.seed, "table", at.operation, at.value)

    def _value(self, operation: int, place: int) -> int:
        return self.in_slot + operation * self.settings.table_values + place

    def _first_input(self, operation: int) -> int:
        return operation // self.settings.tables * self.in_slot


@lru_cache(maxsize=8)
def tables_of(settings: WorldSettings) -> Tables:
    return Tables(settings)
