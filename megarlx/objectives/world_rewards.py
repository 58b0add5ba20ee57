"""Rewards of the synthetic worlds: what their questions and requests ask for, checked exactly."""

from __future__ import annotations

from megarlx.data.synthetic.behaviours import follows
from megarlx.data.synthetic.world import is_correct
from megarlx.objectives.samples import Sample


def world_answer(samples: list[Sample]) -> list[float]:
    """1 where the completion stopped by itself, right behind `####` and the reference."""
    rewards = []
    for sample in samples:
        if sample.reference is None:
            raise ValueError(f"world_answer: no reference for the prompt {sample.prompt!r}")
        good = sample.finish_reason != "length" and is_correct(sample.completion, sample.reference)
        rewards.append(float(good))
    return rewards


def world_behaviour(samples: list[Sample]) -> list[float]:
    """1 where the completion stopped by itself and does what the request asks."""
    rewards = []
    for sample in samples:
        asked = sample.metadata.get("behaviour"), sample.metadata.get("arguments")
        if None in asked:
            raise ValueError(
                f"world_behaviour: the prompt {sample.prompt!r} has the metadata "
                f"{sorted(sample.metadata)}; needed are behaviour and arguments"
            )
        done = follows(*asked, sample.completion)  # type: ignore[arg-type]
        rewards.append(float(sample.finish_reason != "length" and done))
    return rewards
