"""Rewards in processes of their own, which may hang or crash without harm to the run."""

from __future__ import annotations

import queue
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from megarlx.config.reward import RewardConfig
from megarlx.redact import check_kept
from megarlx.rollouts.rewards import worker as reward_worker
from megarlx.rollouts.rewards.sample import Sample
from megarlx.rollouts.rewards.values import described, numbers, wrong
from megarlx.rollouts.workers.worker_process import (
    CallFailed,
    CannotStart,
    Kind,
    Limits,
    Tally,
    WorkerProcess,
)
from megarlx.rollouts.workers.worker_program import describe


class RewardError(RuntimeError):
    """A reward that cannot be used at all, or fails too often: the run stops."""


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


Ask = Callable[[list[Sample]], Sequence[Any]]


def score(label: str, ask: Ask, samples: list[Sample], tally: Tally) -> Outcome:
    """One call for all samples; if it fails, one for each, so that only the bad ones are lost."""
    if tally.hopeless:
        why = f"{tally.failed} of the {tally.answered} samples before it failed"
        failed = [Failure(label, "not_asked", why, sample) for sample in samples]
        return Outcome([None] * len(samples), dict(enumerate(failed)))
    try:
        values = ask(samples)
    except CallFailed as problem:
        if len(samples) == 1:
            failure = Failure(label, problem.kind, problem.detail, samples[0])
            tally.add(1, 1)
            return Outcome([None], {0: failure})
        tally.too_slow += problem.kind == "timeout"
        return joined([score(label, ask, [sample], tally) for sample in samples])
    if len(values) != len(samples):
        # Asked one by one it may return one value each, and nobody would know which were meant.
        raise RewardError(
            f"reward {label}: returned {len(values)} values for {len(samples)} samples; it must "
            "return one for each, None where it has nothing to say"
        )
    kept: list[float | None] = []
    failures: dict[int, Failure] = {}
    for at, value in enumerate(values):
        kind = None if value is None else wrong(value)
        kept.append(value if kind is None else None)
        if kind is not None:
            failures[at] = Failure(label, kind, described(value), samples[at])
    tally.add(len(kept), len(failures))
    return Outcome(kept, failures)


def joined(outcomes: Sequence[Outcome]) -> Outcome:
    values: list[float | None] = []
    failures: dict[int, Failure] = {}
    for outcome in outcomes:
        failures |= {len(values) + at: failure for at, failure in outcome.failures.items()}
        values += outcome.values
    return Outcome(values, failures)


class RewardProcess:
    """One worker that serves a reward."""

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self._worker = WorkerProcess(
            "megarlx.rollouts.rewards.worker:server",
            {"function": config.function, "options": config.options},
            Limits(config.time_limit_seconds, config.start_limit_seconds, config.memory_limit_mb),
        )

    def start(self) -> None:
        try:
            self._worker.start()
        except CannotStart as error:
            raise RewardError(f"reward {self.config.function}: could not start: {error}") from error

    def ask(self, samples: list[Sample]) -> Sequence[Any]:
        self.start()
        reply = self._worker.ask([asdict(sample) for sample in samples])
        if "wrong_shape" in reply:
            raise CallFailed("wrong_shape", reply["wrong_shape"])
        rewards: Sequence[Any] = reply["rewards"]
        return rewards

    def close(self) -> int:
        return self._worker.close()


class RewardPool:
    """A reward function in `config.workers` processes; with none, in this one, unguarded."""

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self._function: Any = None
        self._said_slow = False
        try:
            check_kept(config.options, f"reward {config.function}: options")
        except ValueError as error:
            raise RewardError(str(error)) from None
        if config.workers == 0:
            try:
                self._function = reward_worker.load(config.function, config.options)
            except Exception as error:
                what = describe(error)
                raise RewardError(f"reward {config.function}: could not start: {what}") from error
            return
        self._processes = [RewardProcess(config) for _ in range(config.workers)]
        self._idle: queue.SimpleQueue[RewardProcess] = queue.SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(config.workers, thread_name_prefix="reward")

    def start(self) -> None:
        """One of the processes, which tells whether the others can start."""
        if self._function is None:
            self._processes[0].start()

    def score(self, samples: list[Sample]) -> Outcome:
        size, tally = self.config.samples_per_call, Tally()
        calls = [samples[i : i + size] for i in range(0, len(samples), size)]
        if self._function is not None:
            return joined([score(self.config.label, self._here, call, tally) for call in calls])
        found = joined(list(self._threads.map(lambda call: self._in_worker(call, tally), calls)))
        if tally.too_slow and not self._said_slow:
            self._said_slow = True
            warnings.warn(self._slow(tally.too_slow, len(calls)), stacklevel=2)
        return found

    def _slow(self, killed: int, calls: int) -> str:
        one = self.config
        return (
            f"reward {one.label}: {killed} of {calls} calls, of up to {one.samples_per_call} "
            f"samples, took longer than time_limit_seconds = {one.time_limit_seconds:g}; they were "
            "killed and made again sample by sample, which takes long: raise it, or lower "
            "samples_per_call"
        )

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
            raise CallFailed("error", describe(error)) from error
        try:
            return numbers(values)
        except (TypeError, ValueError) as error:
            raise CallFailed("wrong_shape", describe(error)) from error

    def close(self) -> None:
        if self._function is None:
            self._threads.shutdown(cancel_futures=True)
            for process in self._processes:
                process.close()
