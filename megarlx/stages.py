"""A stage: some steps of one or more objectives, and how they are combined."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megarlx.averaging import Shares
from megarlx.objectives.interface import Objective
from megarlx.optimizer import AdamSettings

LearningRate = Callable[[int], float]  # steps the objective has taken -> learning rate


@dataclass(frozen=True)
class TrainedObjective:
    """An objective with its own optimizer settings and learning-rate course."""

    objective: Objective
    adam: AdamSettings
    learning_rate: LearningRate
    turns: int = 1  # steps in a row, where objectives alternate
    goes_on: bool = False  # with the moments, data and course it had before


class TrainingStage:
    def __init__(
        self,
        objectives: Sequence[TrainedObjective],
        *,
        steps: int | None = None,  # None: without end
        combine: Literal["single", "alternate", "average"] = "average",
        shared_moments: bool = False,
        shares: Shares | None = None,
    ) -> None:
        self.members = {trained.objective.name: trained for trained in objectives}
        if len(self.members) != len(objectives):
            names = [trained.objective.name for trained in objectives]
            raise ValueError(f"objectives need different names; given: {', '.join(names)}")
        self.steps, self.combine, self.shared_moments = steps, combine, shared_moments
        self.shares = shares
        self._first_losses: dict[str, float] = {}

    @property
    def going_on(self) -> set[str]:
        return {name for name, trained in self.members.items() if trained.goes_on}

    def objectives_at(self, step: int) -> list[str]:
        """Those that are trained at a step of the stage, counted from 0."""
        if self.combine != "alternate":
            return list(self.members)
        turn = step % sum(trained.turns for trained in self.members.values())
        for name, trained in self.members.items():
            if turn < trained.turns:
                return [name]
            turn -= trained.turns
        raise AssertionError("turns add up to less than their sum")

    def shares_at(self, step: int) -> dict[str, float] | None:
        """None: equal shares of those that are trained."""
        return None if self.shares is None or self.combine != "average" else self.shares.at(step)

    @property
    def adapts(self) -> bool:
        return self.shares is not None and self.shares.adaptation is not None

    def observe(self, objectives: Mapping[str, Objective], losses: Mapping[str, float]) -> None:
        """Signals of the step that was just made, for adaptive shares."""
        assert self.shares is not None
        signals = {}
        for name in self.members:
            signal = objectives[name].signal()
            if signal is None:
                first = self._first_losses.setdefault(name, losses[name])
                signal = losses[name] / first if first > 0 else 0.0
            signals[name] = signal
        self.shares.observe(signals)

    def state(self) -> dict[str, Any]:
        if not self.adapts:
            return {}
        assert self.shares is not None
        return {**self.shares.state(), "first_losses": dict(self._first_losses)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        if not self.adapts:
            return
        assert self.shares is not None
        self.shares.load_state(state)
        self._first_losses = {str(k): float(v) for k, v in state["first_losses"].items()}
