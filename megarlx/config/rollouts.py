"""Rollouts that a run keeps, and what of another run's is read."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from megarlx.config.section import Section

TooLong = Literal["stop", "skip"]
ROLLOUTS = "rollouts:"  # what a path begins with that names a run's rollouts
_REFERENCE = re.compile(r"(?P<run>.+?)(?:@(?P<step>\d+))?")


def when_too_long(told: TooLong | None, *, rollouts: bool) -> TooLong:
    """What a model wrote is as long as it is; what a file holds was meant to be learned."""
    return told or ("skip" if rollouts else "stop")


def run_and_step(text: str) -> tuple[str, int | None] | None:
    """Of RUN or RUN@N; None where it is neither."""
    found = _REFERENCE.fullmatch(text)
    if found is None or found["run"].endswith("@latest"):
        return None
    return found["run"], None if found["step"] is None else int(found["step"])


class BankConfig(Section):
    """Keeps every sample of an rl objective in the run's folder."""

    tokens: bool = Field(default=False, description="Whether the ids of each sample are kept too")
    max_mib: int = Field(
        default=1024, ge=1, description="Size on the disk, in MiB, above which the oldest go"
    )


class RolloutFilter(Section):
    """Which rollouts of a run are read."""

    min_reward: float = Field(default=1.0, description="Least total reward of a sample")
    marked: bool = Field(
        default=False, description="Whether a sample must end in its one marked answer (####)"
    )
    per_question: int = Field(default=4, ge=1, description="Most samples of a question")
    dedup: bool = Field(default=True, description="Whether equal answers to a question count once")
    newest: bool = Field(
        default=False, description="Whether a question's latest samples are taken, not its first"
    )
