"""A seeded share of the tests, for a run that has no time for all of them.

    pytest --share 0.2 --share-seed 7 --whole test_pipeline --whole test_pipeline_plan

takes about a fifth of the tests, others with another seed, and all tests of the files named.
"""

from __future__ import annotations

import hashlib
import signal
import threading
from pathlib import Path

import pytest


def pytest_configure() -> None:
    """What is started in the background has signals switched off, and hands that on to what tests
    start; they are switched on again."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number, usual in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("share")
    group.addoption("--share", type=float, default=1.0, help="of the tests, 0 to 1 (default: all)")
    group.addoption("--share-seed", type=int, default=0, help="another seed takes other tests")
    group.addoption("--whole", action="append", default=[], help="a file to take whole, by stem")


def is_taken(name: str, share: float, seed: int) -> bool:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    share, seed = config.getoption("--share"), config.getoption("--share-seed")
    if not 0 <= share <= 1:
        raise pytest.UsageError(f"--share is {share}; allowed are 0 to 1")
    whole = set(config.getoption("--whole"))
    if unknown := whole - {Path(item.path).stem for item in items}:
        raise pytest.UsageError(f"--whole names {sorted(unknown)}: no collected file is called so")
    left = [
        item for item in items
        if not (Path(item.path).stem in whole or is_taken(item.nodeid, share, seed))
    ]  # fmt: skip
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]
