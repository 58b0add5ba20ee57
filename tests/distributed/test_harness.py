"""The harness itself: results, failures, and that a failure harms no later case."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from harness import WorkerError


def rank_and_sum(offset: int) -> tuple[int, int, float]:
    if not dist.is_initialized():
        return 0, 1, float(offset)
    x = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(x)
    return dist.get_rank(), dist.get_world_size(), x.item()


def process_id() -> int:
    return os.getpid()


def threads_and_seed() -> tuple[int, int]:
    threads, seed = torch.get_num_threads(), torch.initial_seed()
    torch.manual_seed(123)
    return threads, seed


def fails_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError("the cause")
    dist.barrier()


def is_killed_on(rank: int) -> int:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return dist.get_rank()


def sleeps_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(60)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rank_runs_in_a_group_of_the_size_asked_for(run, world_size):
    expected = float(sum(range(world_size)) + 10 * world_size)
    assert run(world_size, rank_and_sum, 10) == [
        (rank, world_size, expected) for rank in range(world_size)
    ]


def test_workers_are_kept_between_cases_and_shared_by_smaller_worlds(run):
    first = run(3, process_id)
    assert len({*first, os.getpid()}) == 4
    assert run(3, process_id) == first
    assert run(2, process_id) == first[:2]


def test_a_case_sees_nothing_of_the_seed_of_the_one_before(run):
    assert run(2, threads_and_seed) == run(2, threads_and_seed) == [(1, 0)] * 2


def test_the_first_exception_is_raised_with_its_rank_and_traceback(run):
    with pytest.raises(WorkerError, match=r"(?s)rank 1: .*in fails_on.*KeyError: 'the cause'") as e:
        run(3, fails_on, 1)
    assert e.value.rank == 1


def test_a_worker_that_dies_is_named(run):
    with pytest.raises(WorkerError, match=r"rank 2: died in is_killed_on with exit code -9"):
        run(3, is_killed_on, 2)


def test_an_expected_death_gives_none_for_that_rank(run):
    assert run(3, is_killed_on, 2, may_die=[2]) == [0, 1, None]


def test_a_stuck_case_ends_at_its_time_limit(run):
    run(2, process_id)  # so that starting processes is not what is timed
    begin = time.monotonic()
    with pytest.raises(WorkerError, match=r"did not finish within 0.5 s on ranks 1"):
        run(2, sleeps_on, 1, time_limit=0.5)
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("breaks", [fails_on, is_killed_on])
def test_a_failed_case_leaves_working_workers_behind(run, breaks):
    before = run(2, process_id)
    with pytest.raises(WorkerError):
        run(2, breaks, 1)
    assert not set(before) & set(run(2, process_id))
    assert run(2, rank_and_sum, 0) == [(0, 2, 1.0), (1, 2, 1.0)]
