"""A reward that differs within a group from the first step on, whatever a model has learned."""

from __future__ import annotations

from megarlx.rollouts.rewards.sample import Sample


def share_of_e(samples: list[Sample]) -> list[float | None]:
    return [s.completion.count("e") / max(len(s.completion), 1) for s in samples]
