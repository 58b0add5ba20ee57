"""Distillation: what teaches, and on what texts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megarlx.config.own_samples import OwnSamplesConfig, for_rl_alone
from megarlx.config.rollouts import RolloutFilter, TooLong, run_and_step, when_too_long

Share = Annotated[float, Field(gt=0)]


class DistillConfig(OwnSamplesConfig):
    """The model's distributions are drawn to those of frozen teachers, with kl = 'reverse' on its
    own samples."""

    teachers: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        description="RUN@N of each, with this model's shape and tokenizer"
    )
    teacher_weights: Annotated[tuple[Share, ...], Field(strict=False)] | None = Field(
        default=None, description="How much each counts, relative to the others; absent: equally"
    )
    kl: Literal["reverse", "forward"] = Field(
        default="reverse",
        description="KL(model, teacher) on own rollouts, or KL(teacher, model) on those of a run",
    )
    rollouts: str | None = Field(
        default=None, description="RUN or RUN@N, whose rollouts are read, for kl = 'forward'"
    )
    filter: RolloutFilter = Field(
        default=RolloutFilter(), description="Which of the rollouts are read"
    )
    prompts_per_rollout: int = Field(default=16, ge=1, description="Prompts of a rollout")
    samples_per_prompt: int = Field(default=4, ge=1, description="Samples of each prompt")
    rollout_every_steps: int = Field(
        default=10, ge=1, description="Steps that train on a rollout before the next is made"
    )
    temperature: float = Field(
        default=1.0, gt=0, description="Of sampling, and of both distributions"
    )

    @property
    def samples(self) -> bool:
        """Whether it generates text."""
        return self.kl == "reverse"

    @property
    def when_too_long(self) -> TooLong:
        return when_too_long(self.too_long, rollouts=self.rollouts is not None)

    @property
    def shares(self) -> tuple[float, ...]:
        """Of each teacher; they sum to 1."""
        weights = self.teacher_weights or (1.0,) * len(self.teachers)
        return tuple(weight / sum(weights) for weight in weights)

    def problems(self) -> list[tuple[str, str]]:
        found = []
        if not self.teachers:
            found.append(("teachers", "are none; at least one is needed, RUN@N"))
        for one in self.teachers:
            named = run_and_step(one)
            if named is None or named[1] is None:
                found.append(("teachers", f"name {one!r}; allowed is RUN@N, N its step"))
        weights = self.teacher_weights
        if weights is not None and len(weights) != len(self.teachers):
            given = f"are {list(weights)} for {len(self.teachers)} teachers"
            found.append(("teacher_weights", f"{given}; one each is needed"))
        if (self.kl == "forward") != (self.rollouts is not None):
            given = "is missing" if self.rollouts is None else f"is {self.rollouts!r}"
            found.append(("rollouts", f"{given}; it is needed for kl = 'forward', and only there"))
        elif self.rollouts is not None and run_and_step(self.rollouts) is None:
            found.append(("rollouts", f"is {self.rollouts!r}; allowed is RUN or RUN@N"))
        if self.rollouts is None and self.filter != RolloutFilter():
            found.append(("filter", "is for kl = 'forward', which reads rollouts"))
        return found + for_rl_alone(self.generator)
