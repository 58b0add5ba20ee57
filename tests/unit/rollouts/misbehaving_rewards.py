"""Rewards that do what rewards must not do, where the completion says so."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from megarlx.rollouts.rewards.sample import Sample

# By what the completion says: what is returned for so many samples.
ODD: dict[str, Any] = {
    "digits": lambda count: ["000"] * count,
    "one text": lambda count: "0" * count,
    "bytes": lambda count: b"0" * count,
    "dict": lambda count: dict.fromkeys(range(count), 1.0),
    "set": lambda count: set(range(count)),
    "lists": lambda count: [["1"]] * count,
    "complex": lambda count: [1j] * count,
    "huge": lambda count: [1e308] * count,
    "least": lambda count: [-1e10] * count,
    "beyond": lambda count: [10**400] * count,
    "objects": lambda count: [object()] * count,
    "no list": lambda count: object(),
}


def obedient(samples: list[Sample], factor: float = 1.0) -> Any:
    print("a reward may print")
    os.write(1, b'{"rewards": [9, 9, 9]}\n')  # and even try to answer by itself
    said = {sample.completion for sample in samples}
    if "hang" in said:
        time.sleep(600)
    if "spin" in said:
        while True:
            pass
    if "crash" in said:
        os.kill(os.getpid(), 11)
    if "exit" in said:
        sys.exit(3)
    if "raise" in said:
        raise RuntimeError("asked to")
    if "hoard" in said:
        return bytearray(1 << 40)
    if "short" in said:
        return [1.0] * (len(samples) - 1)
    if "long" in said:
        return [1.0] * (len(samples) + 1)
    if "scalar" in said:
        return 1.0
    if "text" in said:
        return ["good"] * len(samples)
    if odd := next((ODD[text] for text in said if text in ODD), None):
        return odd(len(samples))
    special = {"nan": float("nan"), "inf": float("inf"), "none": None}
    return [special.get(s.completion, factor * len(s.completion)) for s in samples]


class Counting:
    """Keeps state between calls, as a model does."""

    def __init__(self, start: float) -> None:
        self.next = start

    def __call__(self, samples: list[Sample]) -> list[float]:
        self.next += len(samples)
        return [self.next] * len(samples)


def refuses(samples: list[Sample], never_given: int) -> list[float]:
    raise AssertionError("unreachable")


def process_id(samples: list[Sample]) -> list[float]:
    return [float(os.getpid())] * len(samples)


def forks(samples: list[Sample], how: str) -> list[float]:
    """Leaves a second process behind, which would answer too."""
    child = os.fork()
    if not child and how == "raises":
        raise RuntimeError("in the child")
    if not child and how == "exits":
        sys.exit(0)
    return [float(len(sample.completion)) for sample in samples]


def writes_to_pipe(samples: list[Sample], text: str) -> list[float]:
    """Finds the pipe of answers among its descriptors and writes to it when asked to."""
    if "write" in {sample.completion for sample in samples}:
        for file in range(3, 20):
            try:
                os.write(file, text.encode("latin-1"))
            except OSError:
                continue
    return [float(len(sample.completion)) for sample in samples]


class ForksWhileMade:
    def __init__(self) -> None:
        os.fork()

    def __call__(self, samples: list[Sample]) -> list[float]:
        return [float(len(sample.completion)) for sample in samples]


def largest(samples: list[Sample]) -> list[float]:
    return [1e9] * len(samples)
