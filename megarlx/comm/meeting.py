"""The store through which the processes of a job meet, clean of what an earlier start left there.

torchrun keeps one store for all restarts of a job. The addresses of processes that are dead are
still in it, and a restarted process that reads them waits for nobody. So the ranks that are here
now first agree on a name that only they can know, and keep to keys under that name.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from datetime import timedelta

import torch.distributed as dist

SECONDS_BETWEEN_LOOKS = 0.05


class NobodyCame(RuntimeError):
    """Some ranks did not answer within the time limit."""


def connect(address: str, port: int, rank: int, size: int, limit: timedelta) -> dist.Store:
    """The part of the launcher's store that belongs to these processes alone."""
    store = dist.TCPStore(address, port, is_master=False, timeout=limit, wait_for_workers=False)
    return dist.PrefixStore(agree(store, rank, size, limit.total_seconds()), store)


def agree(store: dist.Store, rank: int, size: int, seconds: float) -> str:
    """A name made of a random word of each rank, the same on all of them.

    Rank 0 cannot tell an old word from a new one. It offers a name made of all the words it sees,
    and each rank answers only an offer that holds its own; when a rank that is late changes its
    word, rank 0 offers again. The name counts when all have answered.
    """
    word, limit = secrets.token_hex(8), time.monotonic() + seconds
    store.set(f"word/{rank}", word)
    return _offer(store, size, limit) if rank == 0 else _answer(store, rank, word, limit)


def roll_call(store: dist.Store, rank: int, size: int, said: str, seconds: float) -> list[int]:
    """The ranks that do not say within `seconds` that they failed too, by one that did.

    A rank that waits for another one fails at its time limit and says so. The one that all wait
    for says nothing: it hangs, or has ended.
    """
    store.set(f"failed/{rank}", said)
    limit = time.monotonic() + seconds
    silent = [other for other in range(size) if other != rank]
    while silent and time.monotonic() < limit:
        silent = [other for other in silent if not store.check([f"failed/{other}"])]
        if silent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
    return silent


def _offer(store: dist.Store, size: int, limit: float) -> str:
    keys = [f"word/{rank}" for rank in range(size)]
    offered = name = ""
    answers = 0
    while time.monotonic() < limit:
        if store.check(keys):
            words = [word.decode() for word in store.multi_get(keys)]
            name = "meeting/" + hashlib.sha256(" ".join(words).encode()).hexdigest()[:24]
            if name != offered:
                for rank in range(1, size):
                    store.set(f"offer/{rank}", f"{words[rank]} {name}")
                offered = name
            answers = store.add(f"{name}/answers", 0)
            if answers == size - 1:
                store.set(f"{name}/agreed", "yes")
                return name
        time.sleep(SECONDS_BETWEEN_LOOKS)
    missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
    if missing:
        raise NobodyCame(f"rank {', '.join(missing[:8])} did not come")
    raise NobodyCame(f"{answers} of {size - 1} ranks answered rank 0")


def _answer(store: dist.Store, rank: int, word: str, limit: float) -> str:
    answered = ""
    while time.monotonic() < limit:
        if store.check([f"offer/{rank}"]):
            heard, name = store.get(f"offer/{rank}").decode().split(" ")
            if heard == word and name != answered:
                store.add(f"{name}/answers", 1)
                answered = name
        if answered and store.check([f"{answered}/agreed"]):
            return answered
        time.sleep(SECONDS_BETWEEN_LOOKS)
    raise NobodyCame("rank 0 said nothing that all agreed on" if answered else "rank 0 did not ask")
