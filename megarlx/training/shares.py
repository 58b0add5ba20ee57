"""How much of each objective's update is applied: constant, scheduled or adaptive weights.

The adaptive rule: an objective i has a signal s_i in [0, 1] at every step: for policy optimisation
the share of groups that had something to teach, for supervised learning its loss as a share of the
stage's first one. With m_i the running mean of s_i,

    share_i ∝ weight_i · m_i ^ sharpness,   and at least `least`

Adam makes updates of full size out of any gradient, also out of noise: what has little to teach is
better heard less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Course:
    """A weight from a stage's first step to its last."""

    first: float = 1.0
    last: float = 1.0

    def at(self, step: int, steps: int | None) -> float:
        if steps is None or steps < 2:
            return self.first
        return self.first + (self.last - self.first) * min(step / (steps - 1), 1.0)


@dataclass(frozen=True)
class Adaptation:
    rate: float
    sharpness: float
    least: float


class Shares:
    """The objectives' shares at each step of a stage. They sum to one."""

    def __init__(
        self,
        courses: Mapping[str, Course],
        steps: int | None = None,
        adaptation: Adaptation | None = None,
    ) -> None:
        if adaptation is not None and adaptation.least * len(courses) > 1:
            raise ValueError(
                f"averaging: least is {adaptation.least}; {len(courses)} objectives allow at most "
                f"{1 / len(courses):.4g}"
            )
        self.courses, self.steps, self.adaptation = dict(courses), steps, adaptation
        self.means: dict[str, float] = {}

    def at(self, step: int) -> dict[str, float]:
        raw = {name: course.at(step, self.steps) for name, course in self.courses.items()}
        if self.adaptation is not None:
            raw = {
                name: weight * self.means.get(name, 1.0) ** self.adaptation.sharpness
                for name, weight in raw.items()
            }
        total = sum(raw.values())
        if total <= 0:  # nothing has any signal: as if all had
            return {name: 1.0 / len(raw) for name in raw}
        shares = {name: weight / total for name, weight in raw.items()}
        return shares if self.adaptation is None else _at_least(shares, self.adaptation.least)

    def observe(self, signals: Mapping[str, float]) -> None:
        assert self.adaptation is not None
        rate = self.adaptation.rate
        for name, signal in signals.items():
            before = self.means.get(name, signal)
            self.means[name] = before + rate * (min(max(signal, 0.0), 1.0) - before)

    def state(self) -> dict[str, Any]:
        return {"means": dict(self.means)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.means = {str(name): float(mean) for name, mean in state["means"].items()}


def _at_least(shares: Mapping[str, float], least: float) -> dict[str, float]:
    """Raises small shares to `least`; the others give in proportion to what they have."""
    low: set[str] = set()
    while True:
        rest = 1.0 - least * len(low)
        held = sum(share for name, share in shares.items() if name not in low)
        found = {
            name: least if name in low else share * rest / held for name, share in shares.items()
        }
        below = {name for name, share in found.items() if share < least and name not in low}
        if not below:
            return found
        low |= below
