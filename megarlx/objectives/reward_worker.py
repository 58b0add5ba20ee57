"""The program of a reward process: reads samples, one JSON object a line, and answers each.

Started as a file, by reward_process.py, in an interpreter of its own: nothing is forked, and
nothing but JSON comes in or goes out. It ends when its input does, even in the middle of a reward.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import queue
import resource
import sys
import threading
from typing import Any, TextIO


def load(name: str, options: dict[str, Any]) -> Any:
    """`module:function`, or `module:Class`: an instance of it with the options."""
    from functools import partial

    module, _, attribute = name.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    return found(**options) if inspect.isclass(found) else partial(found, **options)


def numbers(values: Any) -> list[float | None]:
    return [None if value is None else float(value) for value in values]


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:2000]


def read_lines(stream: TextIO, lines: queue.SimpleQueue[str]) -> None:
    for line in stream:
        lines.put(line)
    os._exit(0)  # the trainer is gone


def main() -> None:
    # What a reward prints must not be read as its answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(2, 1)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=read_lines, args=(requests, lines), daemon=True).start()

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    hello = json.loads(lines.get())
    sys.path[:] = hello["path"]
    if hello["memory_limit_mb"] is not None:
        limit = hello["memory_limit_mb"] << 20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        from megarlx.objectives.samples import Sample

        reward = load(hello["function"], hello["options"])
    except Exception as error:  # noqa: BLE001 a user's module may raise anything; it is reported
        answer(error=describe(error))
        return
    answer(ready=True)
    while True:
        samples = [Sample(**sample) for sample in json.loads(lines.get())]
        try:
            values = reward(samples)
        except Exception as error:  # noqa: BLE001 as above
            answer(error=describe(error))
            continue
        try:
            rewards = numbers(values)
        except (TypeError, ValueError) as error:
            answer(wrong_shape=describe(error))
            continue
        answer(rewards=rewards)


if __name__ == "__main__":
    main()
