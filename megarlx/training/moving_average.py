"""The moving average of a run's weights, in the precision of the masters.

    average <- decay * average + (1 - decay) * weights      after every step

It begins as the weights that the run begins with, and is saved beside them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megarlx.model.build import ParallelModel


class MovingAverage:
    """Of this rank's shard. Every operation is rounded by itself: where an element lies, and in
    which layout, makes no difference."""

    def __init__(self, model: ParallelModel, decay: float) -> None:
        parallel = model.data_parallel
        self.decay = decay
        self.shard = parallel.shard_of_weights().to(parallel.gradient_dtype, copy=True)

    @torch.no_grad()
    def begin(self, weights: Tensor) -> None:
        self.shard.copy_(weights)

    @torch.no_grad()
    def follow(self, weights: Tensor) -> None:
        self.shard.sub_(weights).mul_(self.decay).add_(weights)
