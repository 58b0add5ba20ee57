"""Questions about facts that a world keeps out of its text, or tells wrongly: only RL sees them.

A training question has one of them, as its first step or its last, so that the answer names its
value. Its other facts are drawn as often as the text tells them, which is at least `least_told`
times, and none is kept. A test has it in a composition that no training question about a kept fact
has; its other facts are told, if rarely, as they stand in the context.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property

from megarlx.data.draw import Draw, Split
from megarlx.data.making import Line
from megarlx.study.world.problems import Problem, is_held_out, split_of, table_problem
from megarlx.study.world.settings import WorldError
from megarlx.study.world.tables import Lookup, tables_of
from megarlx.study.world.tellings import Counts
from megarlx.study.world.world import World

GROUPS = ("withheld", "told_wrongly")
BESIDE = "beside_"  # before a group: the other facts of its questions to train on
TRIES = 400
A_FACT = 2  # training questions


class KeptFacts:
    """Of one group. A fact to which no told facts lead has no questions."""

    def __init__(self, world: World, counts: Counts, group: str) -> None:
        self.world, self.counts = world, counts
        self.tables = tables_of(world.settings)
        self.closed = self.tables.withheld | self.tables.told_wrongly
        self.group = group
        self.numbers = sorted(getattr(self.tables, group))
        self._before: dict[int, list[Lookup]] = {}  # facts that lead to a value

    @cached_property
    def train(self) -> list[tuple[int, Problem]]:
        return [(n, p) for n in self.numbers for p in self._training(n)]

    def _training(self, number: int) -> list[Problem]:
        """Of one fact: different questions."""
        found: dict[str, Problem] = {}
        for index in range(10 * A_FACT):
            for problem in self._problem("train", number, index):
                found.setdefault(self.world.writer.question(problem), problem)
            if len(found) == A_FACT or not found:
                break
        return [*found.values()]

    def test(self, count: int) -> Iterator[tuple[int, Problem]]:
        """About so many in all, as many of each fact."""
        for number in self.numbers:
            for index in range(max(1, count // len(self.numbers))):
                for problem in self._problem("test", number, index):
                    yield number, problem

    def lines(self) -> Iterator[Line]:
        """Those to train on; `least_told`: how often the text tells the rarest other fact."""
        writer = self.world.writer
        self._check()
        for index, (number, problem) in enumerate(self.train):
            others = [n for n in map(self.tables.number, problem.lookups) if n != number]
            yield {
                "question": writer.question(problem),
                "answer": writer.answer(problem),
                "id": f"kept/{index}",
                "fact": number,
                "least_told": min(self.counts.right[n] for n in others),
            }

    def solved(self) -> Iterator[Line]:
        """The same questions with their solutions, as of any question to train on."""
        for index, (_, problem) in enumerate(self.train):
            yield self.world.solved(problem, "kept", self.group, index)

    def _check(self) -> None:
        least = self.world.settings.least_told
        asked = Counter(number for number, _ in self.train)
        without = sum(asked[number] < A_FACT for number in self.numbers)
        if least and without:
            raise WorldError(
                f"world: {without} of the {len(self.numbers)} facts {self.group} have fewer than "
                f"{A_FACT} questions whose other facts are told at least least_told = {least} "
                "times; allowed is a lower one, or fewer kept_ranks, or more documents, or fewer "
                f"held_out_compositions than {self.world.settings.held_out_compositions:g}, as a "
                "fact may have but one composition"
            )

    def _problem(self, split: Split, number: int, index: int) -> list[Problem]:
        """One, or none where none is found."""
        settings = self.world.settings
        draw = Draw(settings.seed, "kept", split, number, index)
        for _ in range(TRIES):
            problem = self._drawn(split, number, draw)
            if problem is None or is_held_out(settings, problem):
                continue
            seen = split == "test" and problem.composition in self._of_training
            if not seen and split_of(settings, self.world.writer.question(problem)) == split:
                return [problem]
        return []

    @cached_property
    def _of_training(self) -> frozenset[tuple[int, ...]]:
        return frozenset(problem.composition for _, problem in self.train)

    def _drawn(self, split: Split, number: int, draw: Draw) -> Problem | None:
        at, per_slot = self.tables[number], self.world.settings.tables
        slot = at.operation // per_slot + 1
        least = self.world.settings.least_told if split == "train" else 1
        length = self._length(split, slot, draw)
        value, operations = at.value, [at.operation]
        for _ in range(slot - 1):
            operation = self.tables.leading_to(value)
            chosen = self._one_told(self._leading_to(value), least, draw)
            if chosen is None:
                return None
            value, operations = chosen.value, [operation, *operations]
        start, value = value, self.tables.result(at)
        for later in range(slot, length):
            after = [Lookup(later * per_slot + rank, value) for rank in range(per_slot)]
            chosen = self._one_told(after, least, draw)
            if chosen is None:
                return None
            value, operations = self.tables.result(chosen), [*operations, chosen.operation]
        return table_problem(self.tables, draw.one(self.world.settings.names), start, operations)

    def _length(self, split: Split, slot: int, draw: Draw) -> int:
        """Steps: at least two, so that there is a composition."""
        if split == "train" and slot > 1:
            return slot
        steps = self.world.settings.steps
        lengths = range(max(2, slot), len(steps) + 1)
        return draw.weighted(lengths, [steps[n - 1] for n in lengths])

    def _leading_to(self, value: int) -> list[Lookup]:
        if value not in self._before:
            first = self.tables.leading_to(value) * self.tables.in_slot
            lookups = map(self.tables.__getitem__, range(first, first + self.tables.in_slot))
            self._before[value] = [at for at in lookups if self.tables.result(at) == value]
        return self._before[value]

    def _one_told(self, among: Sequence[Lookup], least: int, draw: Draw) -> Lookup | None:
        numbers = [self.tables.number(at) for at in among]
        counts = [0 if n in self.closed else self.counts.right[n] for n in numbers]
        told = [count if count >= least else 0 for count in counts]
        return draw.weighted(among, told) if any(told) else None
