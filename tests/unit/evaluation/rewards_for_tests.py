"""Rewards that tests name by module:function."""

from megarlx.rollouts.rewards.sample import Sample


def even_letters(samples: list[Sample]) -> list[float]:
    return [1.0 - len(s.completion) % 2 for s in samples]


def even_and_long(samples: list[Sample]) -> list[float]:
    return [1.0 - len(s.completion) % 2 if len(s.completion) > 24 else 0.0 for s in samples]


def broken(samples: list[Sample]) -> list[float]:
    raise RuntimeError("this reward is broken")
