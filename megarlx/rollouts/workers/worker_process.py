"""A user's code in a process of its own, which may hang or crash without harm to the run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megarlx import processes
from megarlx.printable import printable
from megarlx.rollouts.workers import worker_program

Kind = Literal["timeout", "crash", "error", "wrong_shape", "not_finite", "too_large", "not_asked"]

# With as many failures, and most answers among them, what runs there is broken: waiting for the
# time limit of each of the others would only delay the news.
GIVE_UP = 8
LONGEST_ANSWER = 1 << 27  # characters


class CallFailed(Exception):
    """One call went wrong; which of its parts did it is found out by calling again."""

    def __init__(self, kind: Kind, detail: str) -> None:
        self.kind, self.detail = kind, printable(detail)  # a user's code, or a judge, said it
        super().__init__(self.detail)


class CannotStart(RuntimeError):
    """A process whose server cannot be made: no call will ever succeed."""


@dataclass
class Tally:
    """Of one batch, over all its calls."""

    answered: int = 0
    failed: int = 0
    too_slow: int = 0  # calls for several that were killed and made again for each alone

    @property
    def hopeless(self) -> bool:
        return self.failed >= GIVE_UP and 2 * self.failed > self.answered

    def add(self, answered: int, failed: int) -> None:
        self.answered += answered
        self.failed += failed


@dataclass(frozen=True)
class Limits:
    call_seconds: float
    start_seconds: float
    memory_mb: int | None


class WorkerProcess:
    """One process. It is started when first asked, and again after it had to be killed.

    `server` is a module:function that is called there with `arguments` and returns the function
    that is given each request.
    """

    def __init__(self, server: str, arguments: dict[str, Any], limits: Limits) -> None:
        self.server, self.arguments, self.limits = server, arguments, limits
        self.starts = 0  # state of a server is lost with each
        self._asked = 0
        self._process: subprocess.Popen[str] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None

    def start(self) -> subprocess.Popen[str]:
        return self._process or self._started()

    def ask(self, request: Any) -> dict[str, Any]:
        process = self.start()
        reply = self._exchange(process, request, self.limits.call_seconds)
        if "error" in reply:
            raise CallFailed("error", reply["error"])
        return reply

    def _started(self) -> subprocess.Popen[str]:
        # -P: the folder of the file must not come before other modules
        try:
            self._process = process = processes.start(
                [sys.executable, "-P", str(Path(worker_program.__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
            )
        except OSError as error:  # too many open files, processes, or too little memory
            raise CannotStart(f"no process: {error}") from error
        self.starts += 1
        hello = {
            "path": [path or os.getcwd() for path in sys.path],
            "server": self.server,
            "arguments": self.arguments,
            "memory_limit_mb": self.limits.memory_mb,
        }
        try:
            reply = self._exchange(process, hello, self.limits.start_seconds)
        except CallFailed as failed:
            reply = {"error": failed.detail}
        if "error" in reply:
            self.close()
            raise CannotStart(printable(reply["error"]))
        return process

    def _exchange(
        self, process: subprocess.Popen[str], request: Any, limit_seconds: float
    ) -> dict[str, Any]:
        """Both pipes break when the process is killed, which is what the timer does."""
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def kill() -> None:
            late.set()
            processes.signal_group(process)

        self._asked += 1
        line = json.dumps({"number": self._asked, "request": request}) + "\n"
        timer = threading.Timer(limit_seconds, kill)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            line = process.stdout.readline(LONGEST_ANSWER)
        except (BrokenPipeError, ConnectionResetError):
            line = ""
        except UnicodeDecodeError as error:
            line = f"{error}\n"
        finally:
            timer.cancel()
            timer.join()
        if line and not late.is_set():
            reply = _answer(line, self._asked)
            if reply is not None:
                return reply
            self.close()
            raise CallFailed(
                "crash", f"wrote {line[:80]!r} where its answer {self._asked} should be"
            )
        if not late.is_set():
            _let_end(process)
        code = self.close()
        if late.is_set():
            raise CallFailed(
                "timeout",
                f"took longer than {limit_seconds:g} s (time_limit_seconds) and was killed",
            )
        raise CallFailed("crash", f"its process ended with {_ending(code)}")

    def close(self) -> int:
        """The exit status; a process that still runs is killed."""
        process, self._process = self._process, None
        if process is None:
            return 0
        assert process.stdout is not None
        assert process.stdin is not None
        processes.signal_group(process)
        code = process.wait()
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # of what is still in the buffer
            process.stdin.close()
        return code


def _answer(line: str, number: int) -> dict[str, Any] | None:
    """None where the line is no answer to this request: an earlier one's, or not the program's."""
    try:
        reply = json.loads(line)
    except (ValueError, RecursionError):
        return None
    right = line.endswith("\n") and isinstance(reply, dict) and reply.pop("number", 0) == number
    return reply if right else None


def _let_end(process: subprocess.Popen[str]) -> None:
    """A pipe closes before its process has ended: waits a second for the true exit status, which
    stays unread, and with it the process's number its own."""
    for _ in range(100):
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.01)


def _ending(code: int) -> str:
    if code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit status {code}"
