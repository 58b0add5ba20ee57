"""One reward of a run: a function, its weight and the limits it runs under."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from megarlx.config.section import Named, Section


class RewardConfig(Section):
    """A reward function, called with a list of samples for a list of rewards."""

    function: Annotated[str, Named("reward")] = Field(
        description="What scores samples; a class is made once, with the options; see docs/rl.md"
    )
    weight: float = Field(default=1.0, description="Factor of this reward in the sum of all")
    name: str | None = Field(
        default=None, min_length=1, description="Name in the metrics; absent: the function's"
    )
    options: dict[str, Any] = Field(
        default={}, description="Keyword arguments of the function or class"
    )
    workers: int = Field(
        default=1, ge=0, description="Processes it runs in; 0: in the trainer's, without limits"
    )
    samples_per_call: int = Field(default=16, ge=1, description="Most samples of one call")
    time_limit_seconds: float = Field(
        default=10.0, gt=0, description="Longest time of a call; then its process is killed"
    )
    start_limit_seconds: float = Field(
        default=120.0, gt=0, description="Longest time to import or load what the reward needs"
    )
    memory_limit_mb: int | None = Field(
        default=None, ge=64, description="Address space of each process; absent: no limit"
    )

    @property
    def label(self) -> str:
        return self.name or self.function.rpartition(":")[2]
