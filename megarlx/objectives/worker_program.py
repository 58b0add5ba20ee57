"""The program of a worker process: reads requests, one JSON value a line, and answers each.

Started as a file, by worker_process.py, in an interpreter of its own: nothing is forked, and
nothing but JSON comes in or goes out. It ends when its input does, even in the middle of a request.
The first line says which server to make; what it serves is no business of this program.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import sys
import threading
from typing import Any, TextIO


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:2000]


def read_lines(stream: TextIO, lines: queue.SimpleQueue[str]) -> None:
    for line in stream:
        lines.put(line)
    os._exit(0)  # the trainer is gone


def main() -> None:
    # What a user's function prints must not be read as its answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(2, 1)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=read_lines, args=(requests, lines), daemon=True).start()

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    hello = json.loads(lines.get())
    sys.path[:] = hello["path"]
    if hello["memory_limit_mb"] is not None:
        limit = hello["memory_limit_mb"] << 20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        from megarlx.plug import load  # found on the path that the trainer has just sent

        serve = load(hello["server"])(**hello["arguments"])
    except Exception as error:  # noqa: BLE001 a user's module may raise anything; it is reported
        answer({"error": describe(error)})
        return
    answer({"ready": True})
    while True:
        request = json.loads(lines.get())
        try:
            content = serve(request)
        except Exception as error:  # noqa: BLE001 as above
            content = {"error": describe(error)}
        answer(content)


if __name__ == "__main__":
    main()
