"""What an environment is, and what those that come with megarlx can do beyond that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from megarlx.data.order import key_of
from megarlx.data.draw import Draw, Split

Task = dict[str, Any]  # JSON values: what a line of a task file holds
Step = tuple[str, float, bool, dict[str, Any]]
T = TypeVar("T")
TRIES, TEST_PERCENT, VALIDATION_PERCENT = 10_000, 15, 10


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


def drawn_of_split(
    draw: Draw, split: Split, make: Callable[[Draw], T | None], text: Callable[[T], str]
) -> T:
    """Draws until something is made that belongs to the split. Which one it belongs to is a
    function of its text, so no task of one split is one of another."""
    for _ in range(TRIES):
        thing = make(draw)
        if thing is not None and _split_of(text(thing)) == split:
            return thing
    raise ValueError(f"environment: no task of split '{split}' in {TRIES} draws: there are too few")


def _split_of(text: str) -> Split:
    bucket = key_of("environment", "split", text) % 100
    if bucket < TEST_PERCENT:
        return "test"
    return "validation" if bucket < TEST_PERCENT + VALIDATION_PERCENT else "train"
