"""The course of a run's stages as arithmetic: what each step trains, and where averages fall.

Everyone who asks about the course asks here: the trainer, learning rates, checkpoints, excursions
that go on, probes, and plans. Steps of a stage count from 0, and so do those of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate


@dataclass(frozen=True)
class StageTimes:
    """When a stage trains which objective."""

    turns: Mapping[str, int]  # of each objective: its steps in a row, where they alternate
    steps: int | None  # None: without end
    alternates: bool = False
    sync_every: int = 1  # steps that each objective takes alone between averages
    going_on: frozenset[str] = field(default_factory=frozenset)

    def trained_at(self, step: int) -> list[str]:
        if not self.alternates:
            return list(self.turns)
        place = step % sum(self.turns.values())
        ends = accumulate(self.turns.values())
        return [next(name for name, end in zip(self.turns, ends, strict=True) if place < end)]

    def steps_of(self, name: str) -> int:
        """How many of the stage's steps train an objective."""
        assert self.steps is not None  # only tests train without end
        if not self.alternates:
            return self.steps
        rounds, left = divmod(self.steps, sum(self.turns.values()))
        before = 0
        for other, turns in self.turns.items():
            if other == name:
                return rounds * turns + min(max(left - before, 0), turns)
            before += turns
        raise KeyError(name)

    @property
    def averages(self) -> int:
        """How many averages the stage has."""
        assert self.steps is not None
        return -(-self.steps // self.sync_every)

    def averages_at(self, step: int) -> bool:
        """Whether the updates are averaged at the end of a step; the last one always does."""
        return (step + 1) % self.sync_every == 0 or step + 1 == self.steps


@dataclass(frozen=True)
class Timeline:
    stages: Sequence[StageTimes]

    def begin_of(self, index: int) -> int:
        """The steps before a stage."""
        return sum(stage.steps or 0 for stage in self.stages[:index])

    def trained_at_each_step(self) -> Iterator[list[str]]:
        for stage in self.stages:
            for step in range(stage.steps or 0):
                yield stage.trained_at(step)

    def next_average(self, done: int) -> int:
        """The first number of steps done, from `done` on, after which there is one set of weights:
        no objective has taken a step alone."""
        begin = 0
        for stage in self.stages:
            assert stage.steps is not None
            if done <= begin + stage.steps:
                alone = -(-(done - begin) // stage.sync_every) * stage.sync_every
                return begin + min(alone, stage.steps)
            begin += stage.steps
        return done

    def done_at_tokens(self, name: str, per_step: int, wanted: Sequence[int]) -> list[int]:
        """For each count of an objective's tokens: the steps done when it is reached and there is
        one set of weights."""
        left, found, tokens = sorted(wanted), [], 0
        for done, trained in enumerate(self.trained_at_each_step(), start=1):
            if not left:
                break
            tokens += per_step * (name in trained)
            while left and tokens >= left[0]:
                left.pop(0)
                found.append(self.next_average(done))
        return found

    def beginnings(self) -> dict[int, list[str]]:
        """By steps done: the objectives that begin then; one that goes on at its first stage goes
        on from another run, and does not begin."""
        found: dict[int, list[str]] = {}
        seen: set[str] = set()
        for index, stage in enumerate(self.stages):
            for name in stage.turns:
                if name not in seen and name not in stage.going_on:
                    found.setdefault(self.begin_of(index), []).append(name)
                seen.add(name)
        return found

    def waiting(self, index: int) -> list[str]:
        """Objectives that a stage does not train and a later one goes on with."""
        kept: list[str] = []
        decided = set(self.stages[index].turns)
        for stage in self.stages[index + 1 :]:
            kept += [name for name in stage.turns if name in stage.going_on and name not in decided]
            decided |= set(stage.turns)
        return kept

    @property
    def from_before(self) -> set[str]:
        """Objectives that go on with what only another run can have left."""
        first = self.stages[0]
        return {*first.going_on, *self.waiting(0)}

    def last_stage_of(self, name: str) -> int | None:
        """The last stage that trains an objective."""
        found = [index for index, stage in enumerate(self.stages) if name in stage.turns]
        return found[-1] if found else None
