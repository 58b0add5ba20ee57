"""Many episodes of an environment, in processes that may hang or crash without harm to the run.

An episode that makes its process hang or crash is lost. The others of that process are begun again
in a new one and their actions repeated, when they are next asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from megarlx.config.environment import EnvironmentConfig
from megarlx.printable import printable
from megarlx.redact import check_kept
from megarlx.rollouts.environments.interface import Task
from megarlx.rollouts.environments.worker import EnvironmentServer
from megarlx.rollouts.workers.worker_process import (
    CallFailed,
    CannotStart,
    Limits,
    Tally,
    WorkerProcess,
)
from megarlx.rollouts.workers.worker_program import describe


class BrokenEnvironment(RuntimeError):
    """An environment that cannot be used at all, or loses too many episodes: the run stops."""


@dataclass(frozen=True)
class Answer:
    """What a reset or a step brought."""

    observation: str
    reward: float = 0.0
    done: bool = False
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """The episode is lost."""

    kind: str  # one of worker_process.Kind, or too_long, not_encodable, not_repeatable
    detail: str


Outcome = Answer | Failure


@dataclass
class _History:
    """All that is needed to act an episode again."""

    task: Task
    seed: int
    actions: list[str]
    observation: str | None = None  # the last one


class _Server:
    """One process, or none, and the episodes whose state it holds."""

    def __init__(self, config: EnvironmentConfig) -> None:
        self.arguments: dict[str, Any] = {
            "function": config.function,
            "options": config.options,
            "most_characters": config.max_observation_characters,
        }
        self.config, self.held = config, set[int]()
        self.over: list[int] = []  # episodes that the process may forget
        self._process: WorkerProcess | None = None
        if config.workers:
            limits = Limits(
                config.time_limit_seconds, config.start_limit_seconds, config.memory_limit_mb
            )
            server = "megarlx.rollouts.environments.worker:EnvironmentServer"
            self._process = WorkerProcess(server, self.arguments, limits)
        self._here: EnvironmentServer | None = None  # without a process

    def call(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        ends = [{"episode": episode, "end": True} for episode in self.over]
        self.over = []
        if self._process is None:
            if self._here is None:
                self._here = self._made()
            reply = self._here([*ends, *items])
        else:
            try:
                reply = self._process.ask([*ends, *items])
            except CallFailed:
                self.held.clear()
                self._process.close()  # also after an answer that was no answer
                raise
        answers: list[dict[str, Any]] = reply["answers"]
        return answers

    def _made(self) -> EnvironmentServer:
        try:
            return EnvironmentServer(**self.arguments)
        except Exception as error:
            raise CannotStart(describe(error)) from error

    def close(self) -> None:
        if self._process is not None:
            self._process.close()


class EnvironmentPool:
    """Episodes by number, dealt out over `config.workers` processes; with none, all are here."""

    def __init__(self, config: EnvironmentConfig) -> None:
        self.config = config
        try:
            check_kept(config.options, f"environment {config.function}: options")
        except ValueError as error:
            raise BrokenEnvironment(str(error)) from None
        self._histories: dict[int, _History] = {}
        self._servers = [_Server(self.config) for _ in range(max(config.workers, 1))]
        self._threads = ThreadPoolExecutor(len(self._servers), thread_name_prefix="environment")

    def reset(self, starts: dict[int, tuple[Task, int]]) -> dict[int, Outcome]:
        """Begins episodes: their task and seed by number."""
        for episode, (task, seed) in starts.items():
            self._histories[episode] = _History(task, seed, [])
        return self._dealt(starts, self._begin)

    def step(self, actions: dict[int, str]) -> dict[int, Outcome]:
        """One action in each of these episodes. After a failure the episode is over."""
        for episode, action in actions.items():
            self._histories[episode].actions.append(action)
        return self._dealt(actions, self._act)

    def end(self, episodes: Iterable[int]) -> None:
        for episode in episodes:
            if self._histories.pop(episode, None) is not None:
                server = self._server(episode)
                if episode in server.held:
                    server.held.remove(episode)
                    server.over.append(episode)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        for server in self._servers:
            server.close()

    def _server(self, episode: int) -> _Server:
        return self._servers[episode % len(self._servers)]

    def _dealt(
        self,
        episodes: Iterable[int],
        function: Callable[[_Server, list[int], Tally], dict[int, Outcome]],
    ) -> dict[int, Outcome]:
        """Each server's episodes, some at a time; servers side by side."""
        by_server: list[list[int]] = [[] for _ in self._servers]
        for episode in episodes:
            by_server[episode % len(self._servers)].append(episode)
        size, tally = self.config.episodes_per_call, Tally()

        def served(number: int) -> dict[int, Outcome]:
            found: dict[int, Outcome] = {}
            mine = by_server[number]
            for first in range(0, len(mine), size):
                found |= function(self._servers[number], mine[first : first + size], tally)
            return found

        busy = [number for number, mine in enumerate(by_server) if mine]
        mapped = self._threads.map(served, busy) if len(busy) > 1 else map(served, busy)
        found: dict[int, Outcome] = {}
        for part in mapped:
            found |= part
        lost = [episode for episode, outcome in found.items() if isinstance(outcome, Failure)]
        self.end(lost)
        return found

    def _begin(self, server: _Server, episodes: list[int], tally: Tally) -> dict[int, Outcome]:
        return self._asked(server, {e: [self._beginning(e)] for e in episodes}, tally)

    def _act(self, server: _Server, episodes: list[int], tally: Tally) -> dict[int, Outcome]:
        items = {}
        for episode in episodes:
            action = {"episode": episode, "action": self._histories[episode].actions[-1]}
            held = episode in server.held
            items[episode] = [action] if held else [self._beginning(episode), action]
        return self._asked(server, items, tally)

    def _beginning(self, episode: int) -> dict[str, Any]:
        """Up to where the last answer was."""
        history = self._histories[episode]
        replay = history.actions[:-1]
        return {"episode": episode, "task": history.task, "seed": history.seed, "replay": replay}

    def _asked(
        self, server: _Server, items: dict[int, list[dict[str, Any]]], tally: Tally
    ) -> dict[int, Outcome]:
        """One call for all; if it fails, one for each, so that only the bad ones are lost."""
        if tally.hopeless:
            why = f"{tally.failed} of the {tally.answered} episodes before it failed"
            return {episode: Failure("not_asked", why) for episode in items}
        found: dict[int, Outcome] = {}
        try:
            answers = iter(server.call([item for asked in items.values() for item in asked]))
        except CannotStart as error:
            raise self._cannot_start(str(error)) from error
        except CallFailed as problem:
            if len(items) == 1:
                tally.add(1, 1)
                return {episode: Failure(problem.kind, problem.detail) for episode in items}
            for episode, asked in items.items():  # those begun above are begun again
                again = asked if "task" in asked[0] else [self._beginning(episode), *asked]
                found |= self._asked(server, {episode: again}, tally)
            return found
        for episode, asked in items.items():
            found[episode] = outcome = self._outcome(episode, [next(answers) for _ in asked])
            failed = isinstance(outcome, Failure)
            tally.add(1, failed)
            if not failed:
                server.held.add(episode)
        return found

    def _outcome(self, episode: int, answers: list[dict[str, Any]]) -> Outcome:
        """Of one episode's items: what its last one brought."""
        history = self._histories[episode]
        for answer in answers:
            if "failed" in answer:
                return Failure(answer["failed"], printable(answer["detail"]))
        if len(answers) == 2 and answers[0]["observation"] != history.observation:
            return Failure(
                "not_repeatable",
                f"acted again after its process ended, it showed {answers[0]['observation']!r:.80} "
                f"where it had shown {history.observation!r:.80}",
            )
        history.observation = answers[-1]["observation"]
        return Answer(**answers[-1])

    def _cannot_start(self, why: str) -> BrokenEnvironment:
        return BrokenEnvironment(f"environment {self.config.function}: could not start: {why}")
