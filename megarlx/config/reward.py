"""One reward of a run: a function, its weight and the limits it runs under."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from megarlx.config.section import Section

# Short names of what comes with megarlx
BUILT_IN = {
    "marked_answer": "megarlx.objectives.answers:marked_answer",
    "final_number": "megarlx.objectives.answers:final_number",
    "answer_format": "megarlx.objectives.answers:answer_format",
    "length_penalty": "megarlx.objectives.answers:length_penalty",
    "math_equal": "megarlx.objectives.answers:math_equal",
    "world_behaviour": "megarlx.study.world.rewards:world_behaviour",
    "model": "megarlx.objectives.reward_model:RewardModel",
    "judge": "megarlx.objectives.reward_http:Judge",
}


class RewardConfig(Section):
    """A reward function, called with a list of samples for a list of rewards."""

    function: str = Field(
        description="module:function, module:Class made with options, or a name of docs/rl.md"
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

    def problems(self) -> list[tuple[str, str]]:
        module, colon, attribute = self.function.partition(":")
        if self.function in BUILT_IN or (module and colon and attribute.isidentifier()):
            return []
        return [
            (
                "function",
                f"is '{self.function}'; allowed are module:function, module:Class, "
                + ", ".join(BUILT_IN),
            )
        ]

    @property
    def label(self) -> str:
        return self.name or self.function.rpartition(":")[2]

    @property
    def resolved(self) -> RewardConfig:
        """With the whole name of a built-in function."""
        if self.function not in BUILT_IN:
            return self
        changes = {"function": BUILT_IN[self.function], "name": self.label}
        return self.model_copy(update=changes)
