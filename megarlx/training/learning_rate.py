"""Learning rate as a function of the step: warm-up, then one of four courses."""

from __future__ import annotations

import math
from collections.abc import Callable

from megarlx.config.optimizer import OptimizerConfig

LearningRate = Callable[[int], float]


def learning_rate(config: OptimizerConfig, steps: int) -> LearningRate:
    """Step 0 is the first; step `steps` - 1 has reached `final_lr_fraction`.

    The warm-up's first step is already above zero, its last one just below the full rate.
    """
    decay_steps = config.decay_steps if config.decay_steps is not None else max(1, steps // 10)
    first = config.warmup_steps if config.schedule != "wsd" else steps - decay_steps
    length = max(1, steps - 1 - first)

    def fraction(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / (config.warmup_steps + 1)
        done = min(max(step - first, 0) / length, 1.0)
        low = config.final_lr_fraction
        if config.schedule == "constant":
            return 1.0
        if config.schedule == "cosine":
            return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))
        return 1.0 - (1 - low) * done  # linear, and the end of wsd

    return lambda step: config.lr * fraction(step)
