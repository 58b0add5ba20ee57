"""The program of a worker process: reads requests, one JSON value a line, and answers each.

Started as a file, by worker_process.py, in an interpreter of its own: the trainer is never forked,
and nothing but JSON comes in or goes out. A request is {"number": n, "request": …}, its answer an
object with the same number. The first says which server to make; what it serves is no business of
this program.

When the trainer ends, so does this process with all that it started, even in the middle of a
request: a guard of its own, which runs none of the user's code, kills its process group.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import select
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:2000]


def guard(requests: int) -> None:
    """Starts the guard: it kills the process group when nobody can write requests any more.

    A thread could not do it while the user's code holds the interpreter. The guard is no child of
    this process, which may wait for its children.
    """
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    if os.fork():
        os._exit(0)
    watched = select.poll()
    watched.register(requests, 0)  # its hang-up alone: nothing is read here
    for other in (1, 2):  # who waits for the end of these must not wait for the guard
        os.close(other)
    watched.poll()
    os.killpg(0, signal.SIGKILL)


def read_lines(stream: TextIO, lines: queue.SimpleQueue[str]) -> None:
    for line in stream:
        lines.put(line)
    os.killpg(0, signal.SIGKILL)  # the trainer is gone


def made(hello: dict[str, Any]) -> dict[str, Any]:
    sys.path[:] = hello["path"]
    if hello["memory_limit_mb"] is not None:
        limit = hello["memory_limit_mb"] << 20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    from megarlx.plug import load  # found on the path that the trainer has just sent

    return {"serve": load(hello["server"])(**hello["arguments"])}


def answer_of(serve: Callable[[Any], dict[str, Any]], request: Any) -> dict[str, Any]:
    """What is served, or the error. Where the user's code forked, only the first process answers:
    a second answer to one request would put all later ones out of step."""
    process = os.getpid()
    try:
        return serve(request)
    except Exception as error:  # noqa: BLE001 a user's code may raise anything; it is reported
        return {"error": describe(error)}
    finally:
        if os.getpid() != process:
            os._exit(0)


def main() -> None:
    guard(requests=0)
    # When memory runs out, this process goes before the trainer; not every system has that.
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")
    # What a user's function prints must not be read as its answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(2, 1)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=read_lines, args=(requests, lines), daemon=True).start()
    serve = made
    while True:
        numbered = json.loads(lines.get())
        content = answer_of(serve, numbered["request"])
        if "serve" in content:
            serve = content.pop("serve")
        answers.write(json.dumps({**content, "number": numbered["number"]}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
