"""What goes wrong in a bad night, decided by what the model says: the same each time."""

from __future__ import annotations

import os
import signal
import time
import zlib
from typing import Any


def draw(text: str) -> int:
    return zlib.crc32(text.encode(errors="surrogatepass"))


def reward(samples: list[Any], one_in: int) -> list[float]:
    """Of `one_in` samples about one makes its process hang, and one makes it crash."""
    for sample in samples:
        fate = draw(sample.completion) % one_in
        if fate == 0:
            time.sleep(600)
        if fate == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
    return [draw(sample.completion) % 7 / 7 for sample in samples]


class Flooding:
    """Echoes; to about one in `one_in` actions it answers with more than anybody can read."""

    def __init__(self, one_in: int) -> None:
        self.one_in = one_in

    def reset(self, task: dict[str, Any], seed: int) -> str:
        self.turns = 0
        return str(task["question"])

    def step(self, action: str) -> tuple[str, float, bool, dict[str, Any]]:
        self.turns += 1
        flood = draw(action) % self.one_in == 0
        seen = "w" * 10_000_000 if flood else "w1"
        return seen, draw(action) % 5 / 5, self.turns == 2, {"valid": True}
