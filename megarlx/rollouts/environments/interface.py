"""What an environment is, and what a closed world can do beyond that."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

from megarlx import plug
from megarlx.data.draw import Draw, Split

if TYPE_CHECKING:  # what pydantic needs is slow to import, and workers start often
    from megarlx.config.environment import EnvironmentConfig

Task = dict[str, Any]  # JSON values: what a line of a task file holds
Step = tuple[str, float, bool, dict[str, Any]]


class Environment(Protocol):
    """One episode at a time; `reset` begins the next.

    The same task, seed and actions must give the same observations: an episode whose process died
    of another one is brought back by acting it again.

    `info` may hold `success` (bool, looked at when the episode is done; without it a positive sum
    of rewards is a success) and `valid` (bool; whether the action was one). Other numbers and texts
    are kept with the turn.
    """

    def reset(self, task: Task, seed: int) -> str: ...

    def step(self, action: str) -> Step: ...


class BuiltIn(Environment, Protocol):
    """Closed worlds of a few words, with tasks without end.

    A task is a function of the settings, the split and its number, and every one can be solved.
    """

    @property
    def words(self) -> list[str]:
        """All words of observations and actions, in a fixed order, for a WordTokenizer."""
        ...

    def task(self, split: Split, index: int) -> Task: ...

    def solution(self) -> str | None:
        """The action of a policy that solves every task, from where the episode stands now; None
        once mistakes have left no way."""
        ...

    def random_action(self, draw: Draw) -> str:
        """One of the actions that are valid words here, drawn evenly by kind."""
        ...


def built_in(config: EnvironmentConfig) -> BuiltIn:
    """An environment in this process, which has the methods of one."""
    environment: BuiltIn = plug.resolve("environment", config.function)(**config.options)
    for name in ("words", "task", "solution", "random_action"):
        if not hasattr(type(environment), name):
            raise ValueError(
                f"environment {config.function}: it has no {name}; demonstrations can be made of "
                "those that come with megarlx, and of others with the same methods"
            )
    return environment


def success_rate(
    environment: BuiltIn, tasks: Iterable[Task], *, max_turns: int, draw: Draw | None = None
) -> float:
    """Of the solver; with `draw`, of a policy that acts at random."""
    solved, count = 0, 0
    for task in tasks:
        environment.reset(task, 0)
        count += 1
        for _ in range(max_turns):
            action = environment.solution() if draw is None else environment.random_action(draw)
            if action is None:
                break
            _, _, done, info = environment.step(action)
            if done:
                solved += bool(info.get("success"))
                break
    return solved / max(count, 1)
