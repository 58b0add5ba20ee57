"""A frozen policy: a shard of the weights as they were, put in place for a pass.

It costs a shard between passes, and one more copy of this rank's weights while a pass runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megarlx.parallel.data_parallel import DataParallel


def frozen_copy(weights: Tensor) -> Tensor:
    return weights.detach().clone()


@contextmanager
@torch.no_grad()
def weights_in_place(data_parallel: DataParallel, shard: Tensor) -> Iterator[None]:
    """Every rank's shard is gathered into the model's weights; afterwards they are as before."""
    live = data_parallel.weights.clone()
    data_parallel.gather_weights(shard)
    try:
        yield
    finally:
        data_parallel.weights.copy_(live)
