"""Runs a function in many processes, for tests of what happens between them.

    def doubled(x): ...                       # a module-level function; runs on every rank
    def test_...(run):                        # the fixture of conftest.py
        assert run(4, doubled, 3) == [6] * 4  # one result a rank

The worker processes live from case to case: forked from a server that has imported torch, one
thread each, the first `world_size` of the pool take part in a case, and each case gets a gloo
process group of its own. After a failure the workers of the case are killed and made anew, so that
a broken case cannot harm the next. The exception that arrived first is raised here with its rank
and its traceback: those of the other ranks are mostly its echoes.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVE_SECONDS = 20.0  # the limit of the default process group of a case


class WorkerError(AssertionError):
    """A rank raised, died or did not finish."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(f"rank {rank}: {message}")
        self.rank = rank


@dataclass(frozen=True)
class _Case:
    number: int
    rank: int
    world_size: int
    import_path: list[str]
    call: bytes  # pickled (function, args); opened only after import_path is in place


@dataclass
class _Worker:
    process: Any
    connection: Connection


class Pool:
    """Worker processes, made when first needed."""

    def __init__(self) -> None:
        # forkserver and not fork: the test process has threads (the store, OpenMP, the tests'
        # own), and forking those is not safe. The server has none.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["torch", "torch.distributed", "megarlx.training.trainer"]
        )
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._workers: list[_Worker] = []
        self._cases = 0

    def run(
        self,
        world_size: int,
        function: Callable[..., Any],
        *args: Any,
        time_limit: float = 60.0,
        may_die: Iterable[int] = (),
    ) -> list[Any]:
        """function(*args) on each of `world_size` ranks; the results in rank order.

        A rank in `may_die` may end its process; its result is then None.
        """
        may_die = frozenset(may_die)
        while len(self._workers) < world_size:
            self._workers.append(self._spawn())
        workers = self._workers[:world_size]
        self._cases += 1
        call = pickle.dumps((function, args))
        clean = False
        try:
            for rank, worker in enumerate(workers):
                case = _Case(self._cases, rank, world_size, sys.path, call)
                worker.connection.send(case)
            results = _collect(workers, function.__name__, time_limit, may_die)
            clean = not may_die
        finally:
            if not clean:
                self._discard(world_size)
        return results

    def process_ids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    def close(self) -> None:
        self._discard(len(self._workers))

    def _spawn(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(theirs, self._store.port), daemon=True, name="rank"
        )
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _discard(self, count: int) -> None:
        """Kills the first `count` workers; the next case that needs them makes new ones."""
        gone, self._workers = self._workers[:count], self._workers[count:]
        for worker in gone:
            worker.process.kill()
        for worker in gone:
            worker.process.join()
            worker.connection.close()


def _collect(
    workers: list[_Worker], name: str, time_limit: float, may_die: frozenset[int]
) -> list[Any]:
    deadline = time.monotonic() + time_limit
    results: list[Any] = [None] * len(workers)
    waiting = dict(enumerate(workers))
    while waiting:
        rank_of = {worker.connection: rank for rank, worker in waiting.items()}
        ready = wait(list(rank_of), max(0.0, deadline - time.monotonic()))
        if not ready:
            ranks = ", ".join(map(str, waiting))
            raise WorkerError(
                min(waiting), f"{name} did not finish within {time_limit:g} s on ranks {ranks}"
            )
        for connection in ready:
            rank = rank_of[connection]  # type: ignore[index]
            worker = waiting.pop(rank)
            try:
                succeeded, value = pickle.loads(  # noqa: S301  from our own worker
                    worker.connection.recv_bytes()
                )
            except (EOFError, ConnectionResetError):
                # The pipe closes when the process ends, whatever the reason.
                worker.process.join()
                if rank in may_die:
                    continue
                code = worker.process.exitcode
                raise WorkerError(rank, f"died in {name} with exit code {code}") from None
            if not succeeded:
                raise WorkerError(rank, f"{name} failed\n{value}")
            results[rank] = value
    return results


def _serve(connection: Connection, port: int) -> None:
    """A worker's life: cases, until the test process closes the pipe or is gone."""
    os.environ["OMP_NUM_THREADS"] = "1"
    # gloo looks up this machine's name otherwise, which not every machine can.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    while True:
        try:
            case = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            answer = pickle.dumps((True, _call(case, store)))
        except BaseException:  # noqa: BLE001  SystemExit too is the test's to see
            answer = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(answer)


def _call(case: _Case, store: dist.Store) -> Any:
    sys.path[:] = case.import_path
    function, args = pickle.loads(case.call)  # noqa: S301  from our own test
    torch.manual_seed(0)
    # Only now, when every rank of the last case is done: a group that goes earlier takes what is
    # still on its way to a peer with it, and would hide the first failure behind its echoes.
    if dist.is_initialized():
        dist.destroy_process_group()
    if case.world_size > 1:
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(f"case{case.number}", store),
            rank=case.rank,
            world_size=case.world_size,
            timeout=timedelta(seconds=COLLECTIVE_SECONDS),
        )
    return function(*args)
