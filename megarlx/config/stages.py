"""In what stages a run trains, and how a stage makes one update of several objectives'."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from megarlx.config.optimizer import OptimizerConfig
from megarlx.config.section import Named, Section
from megarlx.config.timeline import StageTimes


class WeightConfig(Section):
    """How much of an objective's update is applied, from a stage's first to its last step."""

    first: float = Field(default=1.0, ge=0, description="Weight at the stage's first step")
    last: float | None = Field(default=None, ge=0, description="At its last; absent: as the first")


STEP = re.compile(r".+@\d+")


class ProtectConfig(Section):
    """Weights that an objective does not move."""

    run: str = Field(
        description="RUN@N, an excursion: what it moved most from where it began is protected"
    )
    share: float = Field(
        default=0.05, gt=0, lt=1, description="Of the model's weights, how many are protected"
    )

    def problems(self) -> list[tuple[str, str]]:
        if STEP.fullmatch(self.run):
            return []
        return [("run", f"is '{self.run}'; allowed is RUN@N, a checkpoint by its step")]


class StageObjective(OptimizerConfig):
    """An objective in a stage: its update rule, its learning-rate course, its share."""

    weight: WeightConfig = Field(
        default=WeightConfig(),
        description="Its share under average, relative to the other objectives' weights",
    )
    turns: int = Field(
        default=1, ge=1, description="Steps in a row it gets when objectives alternate"
    )
    inherit: bool = Field(
        default=False,
        description="Whether moments, data and course continue those of the stage or run before",
    )
    protect: ProtectConfig | None = Field(
        default=None, description="Weights that its updates leave as they are; absent: none"
    )


class AdaptiveConfig(Section):
    """Weights that follow how the objectives get on; docs/excursions.md has the rule."""

    rate: float = Field(default=0.1, gt=0, le=1, description="How fast a running mean follows")
    sharpness: float = Field(default=1.0, ge=0, description="How strongly signal moves weights")
    least: float = Field(default=0.1, ge=0, lt=0.5, description="Least share of an objective")


class OuterConfig(Section):
    """Averages of local steps as steps of their own, with Nesterov's momentum."""

    momentum: float = Field(default=0.9, ge=0, lt=1, description="Of the averages' direction")
    rate: float = Field(default=0.7, gt=0, description="What an average's step is multiplied by")


class StageConfig(Section):
    """Some steps of one or more objectives."""

    name: str | None = Field(default=None, min_length=1, description="Absent: its objectives'")
    steps: int = Field(ge=1, description="Optimizer steps of the stage")
    combine: Literal["single", "alternate", "average"] = Field(
        default="single",
        description="One objective, several in turn, or the weighted sum of all their updates",
    )
    of: Literal["updates", "gradients"] = Field(
        default="updates",
        description="What is averaged: updates, each with its own Adam, or gradients for one Adam",
    )
    combination: Annotated[str, Named("combination")] = Field(
        default="weighted_sum",
        description="How updates become one, or gradients; see docs/extending.md",
    )
    placement: Literal["colocated", "replicas"] = Field(
        default="colocated",
        description="Whether every process runs all objectives, or each replica runs one",
    )
    generate_together: bool = Field(
        default=True, description="Whether all replicas help to generate one objective's samples"
    )
    sync_every: int = Field(
        default=1, ge=1, description="Steps each objective takes alone between averages"
    )
    outer: OuterConfig | None = Field(
        default=None, description="Momentum and rate of averages, with sync_every above 1"
    )
    adaptive: AdaptiveConfig | None = Field(
        default=None, description="Weights that adapt, in place of the objectives' own"
    )
    objectives: dict[str, StageObjective] = Field(
        description="What is trained, by name: pretraining, sft, rl or one of [objectives]"
    )

    @property
    def label(self) -> str:
        return self.name or "+".join(self.objectives)

    @property
    def times(self) -> StageTimes:
        return StageTimes(
            {name: one.turns for name, one in self.objectives.items()},
            self.steps,
            self.combine == "alternate",
            self.sync_every,
            frozenset(name for name, one in self.objectives.items() if one.inherit),
        )

    def problems(self) -> list[tuple[str, str]]:
        found = []
        count = len(self.objectives)
        if self.combine == "single" and count != 1:
            found.append(("combine", f"is 'single' with {count} objectives; it takes one"))
        if self.combine != "single" and count < 2:
            found.append(("combine", f"is '{self.combine}' with {count} objectives; it takes two"))
        if self.combine != "average":
            given = {
                "of": self.of != "updates",
                "combination": self.combination != "weighted_sum",
                "placement": self.placement != "colocated",
                "sync_every": self.sync_every != 1,
                "outer": self.outer is not None,
                "adaptive": self.adaptive is not None,
            }
            found += [(k, "is for combine = 'average' only") for k, v in given.items() if v]
        elif sum(o.weight.first for o in self.objectives.values()) <= 0:
            found.append(("objectives", "have no weight above 0"))
        elif self.outer is not None and self.sync_every == 1:
            found.append(("outer", "is given with sync_every = 1; it needs sync_every above 1"))
        if self.of == "gradients" and self.sync_every > 1:
            found.append(("sync_every", f"is {self.sync_every}; with of = 'gradients' it is 1"))
        if self.of == "gradients":
            courses = {
                o.model_copy(update={"weight": WeightConfig()}).to_json()
                for o in self.objectives.values()
            }
            if len(courses) > 1:
                found.append(
                    ("of", "is 'gradients': one Adam; its objectives' settings must be the same")
                )
        return found
