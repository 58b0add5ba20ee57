"""Rewards in processes of their own, which may hang or crash without harm to the run."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megarlx.config.reward import RewardConfig
from megarlx.objectives import reward_worker
from megarlx.objectives.samples import Sample

Kind = Literal["timeout", "crash", "error", "wrong_shape", "not_finite", "not_asked"]

# With as many failures, and most samples among them, a reward is broken: waiting for the time limit
# of each of the others would only delay the news.
GIVE_UP = 8


class RewardError(RuntimeError):
    """A reward that cannot be used at all, or fails too often: the run stops."""


class CallFailed(Exception):
    """One call went wrong; which of its samples did it is found out by calling again."""

    def __init__(self, kind: Kind, detail: str) -> None:
        super().__init__(detail)
        self.kind, self.detail = kind, detail


@dataclass(frozen=True)
class Failure:
    """A sample that a reward could not score."""

    reward: str
    kind: Kind
    detail: str
    sample: Sample


@dataclass(frozen=True)
class Outcome:
    """What came out for each sample; None where the reward said None, or failed."""

    values: list[float | None]
    failures: dict[int, Failure]  # by the sample's place


@dataclass
class Tally:
    """Of one batch of samples, over all its calls."""

    answered: int = 0
    failed: int = 0

    @property
    def hopeless(self) -> bool:
        return self.failed >= GIVE_UP and 2 * self.failed > self.answered

    def add(self, outcome: Outcome) -> Outcome:
        self.answered += len(outcome.values)
        self.failed += len(outcome.failures)
        return outcome


Ask = Callable[[list[Sample]], Sequence[Any]]


def score(label: str, ask: Ask, samples: list[Sample], tally: Tally) -> Outcome:
    """One call for all samples; if it fails, one for each, so that only the bad ones are lost."""
    if tally.hopeless:
        why = f"{tally.failed} of the {tally.answered} samples before it failed"
        failed = [Failure(label, "not_asked", why, sample) for sample in samples]
        return Outcome([None] * len(samples), dict(enumerate(failed)))
    try:
        values = ask(samples)
        if len(values) != len(samples):
            what = f"returned {len(values)} rewards for {len(samples)} samples"
            raise CallFailed("wrong_shape", what)
    except CallFailed as problem:
        if len(samples) == 1:
            failure = Failure(label, problem.kind, problem.detail, samples[0])
            return tally.add(Outcome([None], {0: failure}))
        return joined([score(label, ask, [sample], tally) for sample in samples])
    kept: list[float | None] = []
    failures: dict[int, Failure] = {}
    for at, value in enumerate(values):
        good = value is None or math.isfinite(value)
        kept.append(value if good else None)
        if not good:
            failures[at] = Failure(label, "not_finite", f"returned {value}", samples[at])
    return tally.add(Outcome(kept, failures))


def joined(outcomes: Sequence[Outcome]) -> Outcome:
    values: list[float | None] = []
    failures: dict[int, Failure] = {}
    for outcome in outcomes:
        failures |= {len(values) + at: failure for at, failure in outcome.failures.items()}
        values += outcome.values
    return Outcome(values, failures)


class RewardProcess:
    """One worker. It is started when first asked, and again after it had to be killed."""

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self._process: subprocess.Popen[str] | None = None

    def ask(self, samples: list[Sample]) -> Sequence[Any]:
        process = self._process or self._started()
        request = json.dumps([asdict(sample) for sample in samples])
        reply = self._exchange(process, request, self.config.time_limit_seconds)
        if "error" in reply:
            raise CallFailed("error", reply["error"])
        if "wrong_shape" in reply:
            raise CallFailed("wrong_shape", reply["wrong_shape"])
        rewards: Sequence[Any] = reply["rewards"]
        return rewards

    def _started(self) -> subprocess.Popen[str]:
        config = self.config
        # -P: the folder of the file must not come before other modules
        self._process = process = subprocess.Popen(
            [sys.executable, "-P", str(Path(reward_worker.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,  # killed with all that it started; deaf to Ctrl-C
        )
        hello = {
            "path": [path or os.getcwd() for path in sys.path],
            "function": config.function,
            "options": config.options,
            "memory_limit_mb": config.memory_limit_mb,
        }
        try:
            reply = self._exchange(process, json.dumps(hello), config.start_limit_seconds)
        except CallFailed as failed:
            reply = {"error": failed.detail}
        if "error" in reply:
            self.close()
            raise RewardError(f"reward {config.function}: could not start: {reply['error']}")
        return process

    def _exchange(
        self, process: subprocess.Popen[str], request: str, limit_seconds: float
    ) -> dict[str, Any]:
        """Both pipes break when the process is killed, which is what the timer does."""
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def kill() -> None:
            late.set()
            _kill(process)

        timer = threading.Timer(limit_seconds, kill)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(request + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except (BrokenPipeError, ConnectionResetError):
            line = ""
        finally:
            timer.cancel()
            timer.join()
        if line.endswith("\n") and not late.is_set():
            reply: dict[str, Any] = json.loads(line)
            return reply
        if not late.is_set():
            _let_end(process)
        code = self.close()
        if late.is_set():
            raise CallFailed("timeout", f"took longer than {limit_seconds:g} s and was killed")
        raise CallFailed("crash", f"its process ended with {_ending(code)}")

    def close(self) -> int:
        """The exit status; a process that still runs is killed."""
        process, self._process = self._process, None
        if process is None:
            return 0
        assert process.stdout is not None
        assert process.stdin is not None
        _kill(process)
        code = process.wait()
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # of what is still in the buffer
            process.stdin.close()
        return code


def _kill(process: subprocess.Popen[str]) -> None:
    # Not waited for yet, so the number is still its own. A crashed one keeps its exit status.
    if process.returncode is None:
        os.killpg(process.pid, signal.SIGKILL)


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


class RewardPool:
    """A reward function in `config.workers` processes; with none, in this one, unguarded."""

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self._function: Any = None
        if config.workers == 0:
            try:
                self._function = reward_worker.load(config.function, config.options)
            except Exception as error:
                what = reward_worker.describe(error)
                raise RewardError(f"reward {config.function}: could not start: {what}") from error
            return
        self._processes = [RewardProcess(config) for _ in range(config.workers)]
        self._idle: queue.SimpleQueue[RewardProcess] = queue.SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(config.workers, thread_name_prefix="reward")

    def score(self, samples: list[Sample]) -> Outcome:
        size, tally = self.config.samples_per_call, Tally()
        calls = [samples[i : i + size] for i in range(0, len(samples), size)]
        if self._function is not None:
            return joined([score(self.config.label, self._here, call, tally) for call in calls])
        return joined(list(self._threads.map(lambda call: self._in_worker(call, tally), calls)))

    def _in_worker(self, samples: list[Sample], tally: Tally) -> Outcome:
        process = self._idle.get()
        try:
            return score(self.config.label, process.ask, samples, tally)
        finally:
            self._idle.put(process)

    def _here(self, samples: list[Sample]) -> Sequence[Any]:
        try:
            values = self._function(samples)
        except Exception as error:
            raise CallFailed("error", reward_worker.describe(error)) from error
        try:
            return reward_worker.numbers(values)
        except (TypeError, ValueError) as error:
            raise CallFailed("wrong_shape", reward_worker.describe(error)) from error

    def close(self) -> None:
        if self._function is None:
            self._threads.shutdown(cancel_futures=True)
            for process in self._processes:
                process.close()
