"""What a reward is given. (No torch here: reward processes import this and must start fast.)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class Sample:
    prompt: str
    completion: str
    reference: str | None = None  # the answer of the prompt's line
    metadata: dict[str, Any] = field(default_factory=dict)  # its other fields, as JSON values
    finish_reason: Literal["stop", "stop_string", "length"] = "stop"
    tokens: int = 0  # of the completion


class Reward(Protocol):
    """None: this reward has nothing to say about the sample."""

    def __call__(self, samples: list[Sample]) -> Sequence[float | None]: ...
