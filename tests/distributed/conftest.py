"""The fixture `run(world_size, function, *args)`: see harness.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from harness import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture
def run(pool: Pool) -> Callable[..., list[Any]]:
    return pool.run
