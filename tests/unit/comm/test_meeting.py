"""Ranks agree on a name of their own, whatever earlier starts left in the launcher's store."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from megarlx.comm.meeting import NobodyCame, agree


@pytest.fixture
def port() -> Iterator[int]:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port
    del store  # the server lives as long as it is held


def come(port: int, rank: int, size: int, delay: float = 0.0, seconds: float = 20.0) -> str:
    time.sleep(delay)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    return agree(store, rank, size, seconds)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_start_has_a_name_that_all_its_ranks_know(port: int, size: int) -> None:
    names = set()
    for start in range(3):
        draw = random.Random(start)
        with ThreadPoolExecutor(size) as threads:
            found = list(
                threads.map(
                    lambda rank: come(port, rank, size, draw.uniform(0, 0.3)),  # noqa: B023
                    range(size),
                )
            )
        assert len(set(found)) == 1
        names.add(found[0])
    assert len(names) == 3


@pytest.mark.parametrize("dead", [(0,), (1, 2), (0, 1), (0, 1, 2)])
def test_a_start_that_never_came_together_does_not_disturb_the_next(
    port: int, dead: tuple[int, ...]
) -> None:
    """Some ranks said their word and were killed before the others were there."""
    with ThreadPoolExecutor(3) as threads:
        for gone in [threads.submit(come, port, rank, 4, 0.0, 0.3) for rank in dead]:
            with pytest.raises(NobodyCame):
                gone.result()
    # Rank 0 comes first and finds the words of the dead; the others come one after the other.
    with ThreadPoolExecutor(4) as threads:
        found = set(threads.map(lambda rank: come(port, rank, 4, 0.2 * rank), range(4)))
    assert len(found) == 1


def test_ranks_that_do_not_come_are_named(port: int) -> None:
    with ThreadPoolExecutor(2) as threads:
        first, second = (threads.submit(come, port, rank, 4, 0.0, 0.3) for rank in (0, 2))
        with pytest.raises(NobodyCame, match="rank 1, 3 did not come"):
            first.result()
        with pytest.raises(NobodyCame, match="rank 0 did not ask"):
            second.result()
