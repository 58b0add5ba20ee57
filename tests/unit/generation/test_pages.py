"""Pages of the caches under sequences that come and go at random: who holds what; all end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarlx.generation.pages import Pages
from megarlx.generation.requests import Request, SamplingSettings
from megarlx.generation.rows import Rows
from megarlx.generation.scheduler import Scheduler
from megarlx.generation.stop import StopStrings
from megarlx.model.kv_cache import IDLE_PAGE, PageTable

LONGEST = 40
CPU = torch.device("cpu")


@st.composite
def requests_of(draw: Any) -> list[Request]:
    lengths = draw(st.lists(st.tuples(st.integers(1, 39), st.integers(1, 39), st.integers(0, 5))))
    ids = iter(range(1000))
    return [
        Request([7] * length, [next(ids) for _ in range(samples)], min(new, LONGEST - length))
        for length, new, samples in lengths
    ]


class World:
    """A scheduler over pipeline groups whose tokens come from a coin, and what it must keep."""

    def __init__(
        self, requests: list[Request], groups: int, slots: int, table: PageTable, seed: int
    ) -> None:
        self.table, self.random = table, np.random.default_rng(seed)
        idle = groups * slots
        self.rows = [Rows(slots, idle, CPU) for _ in range(groups)]
        self.pages = Pages(table, requests, LONGEST, turns=False)
        self.scheduler = Scheduler(
            requests,
            SamplingSettings(stop_tokens=(0,)),
            StopStrings((), None),
            rows=self.rows,
            slots=[range(g * slots, (g + 1) * slots) for g in range(groups)],
            pages=self.pages,
            tokens=np.zeros((idle + 1, LONGEST + 1), dtype=np.int64),
            observe=None,
            max_tokens=LONGEST,
            feed_up_to=4,
        )
        self.prefilled: list[int] = []
        self.over: list[int] = []

    def run(self) -> None:
        for group, rows in enumerate(self.rows):
            self._admitted(group, self.scheduler.fill(group))
            assert rows.live <= rows.most
        while any(rows.live for rows in self.rows):
            for group, rows in enumerate(self.rows):
                if rows.live:
                    self.check()
                    drawn = self.random.integers(0, 9, rows.live)
                    finished, admission = self.scheduler.advance(group, drawn)
                    self.over += [done.sequence.index for done in finished]
                    self._admitted(group, admission)

    def _admitted(self, group: int, admission: Any) -> None:
        of_slot = dict(zip(self.rows[group].host_slots.tolist(), self.rows[group].sequences))  # noqa: B905
        self.prefilled += [of_slot[slot].request_index for slot in admission.prefills]

    def check(self) -> None:
        """No place is written by two, none is read before its prompt is there, and what is held is
        what the sequences fill, to a page each."""
        where: dict[int, set[Any]] = {}
        prompts, filled = {}, 0
        for rows in self.rows:
            for row, one in enumerate(rows.sequences):
                slot = torch.tensor(rows.host_slots[row])
                length = len(one.request.prompt) - 1
                end = len(one.request.prompt) + one.request.max_new_tokens - 1
                places = self.table.places(slot, torch.arange(end)).tolist()
                for position, place in enumerate(places):
                    shared = self.table.shares and position < length
                    owner = (one.request_index, position) if shared else (one.index, position)
                    where.setdefault(place, set()).add((shared, *owner))
                assert min(places) >= (IDLE_PAGE + 1) * self.table.size
                if length:
                    assert one.request_index in self.prefilled
                if self.table.shares:
                    prompts[one.request_index] = length
                    filled += end - length
                else:
                    filled += end
        assert all(len(owners) == 1 for owners in where.values())
        filled += sum(prompts.values())
        sequences = len(prompts) + sum(rows.live for rows in self.rows)
        # a prompt whose samples are all still to come, or gone but one that waits, is one more
        spare = (sequences + 1) * (self.table.size - 1) + LONGEST + self.table.size
        assert self.pages.held * self.table.size <= filled + spare
        assert len(where) <= self.pages.held * self.table.size


@settings(max_examples=150, deadline=None)
@given(
    requests_of(),
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from([1, 4, 16, 64]),
    st.booleans(),
    st.integers(0, 400),
    st.integers(0, 99),
)
def test_every_sequence_ends_whatever_pages_there_are(
    requests: list[Request],
    groups: int,
    slots: int,
    size: int,
    shares: bool,
    more: int,
    seed: int,
) -> None:
    """The fewest pages that any of them needs, and some more."""
    of_slot = -(-48 // size)
    pages = max((pages_needed(one, size, shares) for one in requests), default=1) + more // size
    rows = torch.zeros(groups * slots + 1, 1 + 2 * of_slot, dtype=torch.int32)
    world = World(requests, groups, slots, PageTable(rows, 1 + pages, size, shares), seed)
    world.run()
    assert sorted(world.over) == list(range(sum(len(one.sequence_ids) for one in requests)))
    assert world.pages.held == 0
    assert world.pages.most_held <= pages
    if shares:
        assert len(world.prefilled) == len(set(world.prefilled))


def pages_needed(request: Request, size: int, shares: bool) -> int:
    first = len(request.prompt) - 1 if shares else 0
    own = len(request.prompt) + request.max_new_tokens - 1 - first
    return -(-first // size) - (-own // size)


@given(st.integers(2, 300), st.sampled_from([16, 32, 256]), st.booleans())
def test_pages_of_a_slot_hold_its_longest_sequence(longest: int, size: int, shares: bool) -> None:
    table = PageTable.empty(4, longest, size=size, shares=shares)
    assert table.longest >= longest
    most = max(
        pages_needed(Request([1] * n, [0], longest - n), size, shares) for n in range(1, longest)
    )
    each = (table.pages - 1) // 3
    assert each >= most or size > 64
    assert each >= -(-(longest - 1) // size)


def test_a_table_is_the_one_that_a_slot_is_a_page_of() -> None:
    table = PageTable.of_slots(5, 12)
    slots, positions = torch.tensor([[3], [0]]), torch.arange(12)
    assert torch.equal(table.places(slots, positions), slots * 12 + positions)


@pytest.mark.parametrize("tokens", [1, 256, 257, 5000])
def test_the_caches_hold_whole_pages(tokens: int) -> None:
    table = PageTable.empty(4, 300, size=256, shares=True, tokens=tokens)
    assert (table.pages - 1) * 256 - 255 <= tokens <= (table.pages - 1) * 256
