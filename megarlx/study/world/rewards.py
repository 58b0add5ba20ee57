"""The reward of a synthetic world's requests: whether what was asked for was done."""

from __future__ import annotations

from megarlx.rollouts.rewards.sample import Sample
from megarlx.study.world.behaviours import follows


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
