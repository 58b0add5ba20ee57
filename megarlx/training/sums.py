"""Sums over all elements of the model, each counted once, from the shards of all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megarlx.comm.collectives import all_gather, all_reduce_
from megarlx.comm.groups import Group
from megarlx.parallel.data_parallel import DataParallel

CHUNK = 1 << 22  # elements that are taken to fp64 at once


class ModelSums:
    def __init__(self, data_parallel: DataParallel, others: Sequence[Group]) -> None:
        """`others` are the groups that share out the model beside data parallelism: tp and pp."""
        self._groups = (data_parallel.group, *others)
        self._uncounted = data_parallel.uncounted_ranges()

    def norms(self, shards: Sequence[Tensor]) -> Tensor:
        """fp64, the norm of each, the same on every rank."""
        squares = torch.stack([self._squared_norm(shard) for shard in shards])
        for group in self._groups:
            all_reduce_(squares, group)
        return squares.sqrt()

    def _squared_norm(self, shard: Tensor) -> Tensor:
        total = torch.linalg.vector_norm(shard, dtype=shard.dtype).square()
        for start, stop in self._uncounted:
            total = total - torch.linalg.vector_norm(shard[start:stop]).square()
        return total.double()

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """fp64, the same bits on every rank of every replica: summed in the ranks' order."""
        total = _dot(a, b)
        for start, stop in self._uncounted:
            total = total - _dot(a[start:stop], b[start:stop])
        for group in self._groups:
            total = all_gather(total[None], group).sum()
        return total


def _dot(a: Tensor, b: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for x, y in zip(a.split(CHUNK), b.split(CHUNK), strict=True):
        total += x.double() @ y.double()
    return total
