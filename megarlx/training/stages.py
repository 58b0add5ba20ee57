"""A stage: some steps of one or more objectives, and how they are combined."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megarlx.config.timeline import StageTimes
from megarlx.objectives.interface import Objective
from megarlx.training.shares import Shares
from megarlx.training.update_rules import UpdateSettings

LearningRate = Callable[[int], float]  # steps the objective has taken -> learning rate


@dataclass(frozen=True)
class TrainedObjective:
    """An objective with its own optimizer settings and learning-rate course."""

    objective: Objective
    settings: UpdateSettings
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
        placement: Literal["colocated", "replicas"] = "colocated",
        sync_every: int = 1,
        generate_together: bool = True,
    ) -> None:
        """`replicas`: each place on the mesh's replica axis trains one of the objectives, in their
        order. `sync_every`: steps that each takes by itself between averages. `generate_together`:
        all replicas help an objective that makes samples, as long as their weights are equal."""
        self.members = {trained.objective.name: trained for trained in objectives}
        if len(self.members) != len(objectives):
            names = [trained.objective.name for trained in objectives]
            raise ValueError(f"objectives need different names; given: {', '.join(names)}")
        self.times = StageTimes(
            {name: trained.turns for name, trained in self.members.items()},
            steps,
            combine == "alternate",
            sync_every,
            frozenset(name for name, trained in self.members.items() if trained.goes_on),
        )
        self.combine, self.shared_moments = combine, shared_moments
        self.shares = shares
        self.in_replicas = placement == "replicas"
        self.helps = self.in_replicas and generate_together and sync_every == 1
        local = self.in_replicas or sync_every > 1
        if local and combine != "average":
            raise ValueError(
                f"stage: placement is '{placement}' with sync_every {sync_every}; that is for "
                f"combine = 'average', not '{combine}'"
            )
        if sync_every > 1 and shared_moments:
            raise ValueError(
                f"stage: sync_every is {sync_every}; objectives with one Adam for all can take no "
                "steps of their own: allowed is 1"
            )
        self._first_losses: dict[str, float] = {}

    def shares_at(self, step: int) -> dict[str, float] | None:
        """None: equal shares of those that are trained."""
        return None if self.shares is None or self.combine != "average" else self.shares.at(step)

    @property
    def adapts(self) -> bool:
        return self.shares is not None and self.shares.adaptation is not None

    def observe(self, signals: Mapping[str, float | None], losses: Mapping[str, float]) -> None:
        """Signals of the step that was just made, for adaptive shares; None: the loss tells."""
        assert self.shares is not None
        found = {}
        for name in self.members:
            signal = signals[name]
            if signal is None:
                first = self._first_losses.setdefault(name, losses[name])
                signal = losses[name] / first if first > 0 else 0.0
            found[name] = signal
        self.shares.observe(found)

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
