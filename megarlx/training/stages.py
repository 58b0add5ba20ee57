"""A stage: some steps of one or more objectives, and how they are combined."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from megarlx.config.timeline import StageTimes
from megarlx.objectives.interface import Objective
from megarlx.training.combine import Combination, weighted_sum
from megarlx.training.outer import Outer
from megarlx.training.parts import UpdateSettings
from megarlx.training.shares import Shares

LearningRate = Callable[[int], float]  # steps the objective has taken -> learning rate


@dataclass(frozen=True)
class TrainedObjective:
    """An objective with its own optimizer settings and learning-rate course."""

    objective: Objective
    settings: UpdateSettings
    learning_rate: LearningRate
    turns: int = 1  # steps in a row, where objectives alternate
    inherit: bool = False  # with the moments, data and course it had before
    protected: Tensor | None = None  # bool [P], what its updates leave alone


class TrainingStage:
    def __init__(
        self,
        objectives: Sequence[TrainedObjective],
        *,
        steps: int | None = None,  # None: without end
        combine: Literal["single", "alternate", "average"] = "average",
        shared_moments: bool = False,
        combination: Combination = weighted_sum,
        shares: Shares | None = None,
        placement: Literal["colocated", "replicas"] = "colocated",
        sync_every: int = 1,
        generate_together: bool = True,
        outer: Outer | None = None,
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
            frozenset(name for name, trained in self.members.items() if trained.inherit),
        )
        self.combine, self.shared_moments = combine, shared_moments
        self.combination, self.outer = combination, outer
        self.shares = shares
        self.in_replicas = placement == "replicas"
        self.helps = self.in_replicas and generate_together and sync_every == 1
        local = self.in_replicas or sync_every > 1
        if local and combine != "average":
            raise ValueError(
                f"stage: placement is '{placement}' with sync_every {sync_every}; that is for "
                f"combine = 'average', not '{combine}'"
            )
        if combination is not weighted_sum and combine != "average":
            raise ValueError(
                f"stage: its combination is not weighted_sum, and combine is '{combine}'; it is "
                "for 'average'"
            )
        if outer is not None and sync_every == 1:
            raise ValueError("stage: outer is given with sync_every 1; it needs more than 1")
        if sync_every > 1 and shared_moments:
            raise ValueError(
                f"stage: sync_every is {sync_every}; objectives with one state for all can take "
                "no "
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
        """Signals of the step that was just made, for adaptive shares; None: the loss tells.

        A loss that is not finite was of a step that was skipped, and tells nothing.
        """
        assert self.shares is not None
        found = {}
        for name in self.members:
            signal = signals[name]
            if signal is None:
                if not math.isfinite(losses[name]):
                    continue
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


def check_stages(stages: Sequence[TrainingStage]) -> dict[str, Objective]:
    """All objectives by name; one that goes on must do so by the rule that it had."""
    objectives: dict[str, Objective] = {}
    rules: dict[str, str] = {}
    shared: str | None = None  # rule of the state that all objectives of a stage had last
    for stage in stages:
        for name, trained in stage.members.items():
            if objectives.setdefault(name, trained.objective) is not trained.objective:
                raise ValueError(f"two objectives have the name '{name}'")
            before = shared if stage.shared_moments else rules.get(name)
            rule = trained.settings.whole_rule
            if trained.inherit and before not in (None, rule):
                raise ValueError(
                    f"objective '{name}' goes on by the update rule '{trained.settings.rule}'; its "
                    f"state was made by '{before}': give it the same rule, or no inherit"
                )
        made = {name: one.settings.whole_rule for name, one in stage.members.items()}
        if stage.shared_moments:
            shared = next(iter(made.values()))
        else:
            rules |= made
    return objectives


def settings_of_waiting(stages: Sequence[TrainingStage], index: int, name: str) -> UpdateSettings:
    """Of an objective that the stage `index` does not train: those by which it goes on."""
    return next(one.members[name].settings for one in stages[index + 1 :] if name in one.members)
