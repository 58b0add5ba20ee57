"""An environment that a policy acts in over several turns, and the limits of its episodes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from megarlx.config.section import Named, Section


class EnvironmentConfig(Section):
    """A class with reset(task, seed) and step(action), and what an episode in it may cost."""

    function: Annotated[str, Named("environment")] = Field(
        description="What episodes are played in; see docs/agents.md"
    )
    name: str | None = Field(
        default=None, min_length=1, description="Name in the metrics; absent: the class's"
    )
    options: dict[str, Any] = Field(default={}, description="Keyword arguments of the class")
    max_turns: int = Field(default=8, ge=1, description="An episode ends after so many answers")
    max_turn_tokens: int = Field(default=32, ge=1, description="Most tokens of one answer")
    max_episode_tokens: int = Field(
        default=1024, ge=2, description="Most tokens of an episode, observations included"
    )
    max_observation_characters: int = Field(
        default=20_000, ge=1, description="An observation that is longer is an environment's error"
    )
    invalid_action_penalty: float = Field(
        default=0.1, ge=0, description="Taken off the reward of a turn whose action is not valid"
    )
    time_limit_seconds: float = Field(
        default=10.0, gt=0, description="Longest time of a call; then its process is killed"
    )
    start_limit_seconds: float = Field(
        default=120.0, gt=0, description="Longest time to import what the environment needs"
    )
    memory_limit_mb: int | None = Field(
        default=None, ge=64, description="Address space of each process; absent: no limit"
    )
    allowed_failures: float = Field(
        default=0.1, ge=0, le=1, description="Share of a batch's episodes that may be lost"
    )
    workers: int = Field(
        default=1, ge=0, description="Processes it runs in; 0: in the trainer's, without limits"
    )
    episodes_per_call: int = Field(default=16, ge=1, description="Most episodes of one call")

    def problems(self) -> list[tuple[str, str]]:
        found = []
        if self.max_turn_tokens >= self.max_episode_tokens:
            wrong = f"is {self.max_turn_tokens}; it must be below max_episode_tokens = "
            found.append(("max_turn_tokens", wrong + str(self.max_episode_tokens)))
        return found

    @property
    def label(self) -> str:
        return self.name or self.function.rpartition(":")[2]
