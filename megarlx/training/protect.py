"""Which weights an objective leaves as they are: those that an excursion has moved most.

Of all weights of the model the share with the largest |θ - θ_from| is protected, whatever rank
holds them. The threshold is the exact order statistic over the whole model, found digit by digit in
the bits of the differences, so it is the same number in every layout. Weights that moved exactly as
far as the threshold are all protected.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megarlx.checkpoint import WEIGHTS_ONLY, FlatShards, load, read_manifest
from megarlx.comm.collectives import all_reduce_
from megarlx.comm.groups import Group
from megarlx.model.build import ParallelModel
from megarlx.training.sums import CHUNK

DIGIT = 8  # bits


class ProtectError(ValueError):
    """Weights that cannot be protected as asked."""


def protected_mask(model: ParallelModel, moved: Path, start: Path, share: float) -> Tensor:
    """bool [P], of this rank's shard; all ranks call it together with the same checkpoints."""
    away = _weights(model, moved).sub_(_weights(model, start)).abs_()
    saved = read_manifest(moved).tensors.items()
    weights = sum(prod(one.shape) for name, one in saved if not name.startswith(WEIGHTS_ONLY))
    wanted = max(1, round(share * weights))
    parallel, mesh = model.data_parallel, model.mesh
    groups = (parallel.group, mesh.tp, mesh.pp)
    counted = list(_others(parallel.uncounted_ranges(), len(away)))
    threshold = largest(away, wanted, counted, groups)
    if threshold <= 0:
        raise ProtectError(
            f"share = {share} asks for {wanted} of {weights} weights, and {moved} moved fewer of "
            f"them from {start}; allowed is a smaller share"
        )
    return away >= threshold


def _weights(model: ParallelModel, checkpoint: Path) -> Tensor:
    parallel = model.data_parallel
    shard = torch.zeros_like(parallel.shard_of_weights(), dtype=parallel.gradient_dtype)
    shards = FlatShards(parallel.layout, parallel.layouts, parallel.group.rank, {"": shard})
    load(checkpoint, shards, model.mesh.world, ignore=WEIGHTS_ONLY)
    return shard


def _others(ranges: Sequence[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """What lies between ranges, in pieces; padding, whose numbers are 0, too."""
    at = 0
    for start, stop in (*ranges, (size, size)):
        for low in range(at, start, CHUNK):
            yield low, min(low + CHUNK, start)
        at = stop


def largest(
    values: Tensor, place: int, ranges: Sequence[tuple[int, int]], groups: Sequence[Group]
) -> Tensor:
    """The `place`-th largest of numbers of at least 0, those of all ranks' ranges together.

    As integers the bits of such numbers have the same order.
    """
    wide = values.dtype == torch.float64
    bits, width = values.view(torch.int64 if wide else torch.int32), 64 if wide else 32
    found = 0
    for shift in range(width - DIGIT, -1, -DIGIT):
        counts = torch.zeros(1 << DIGIT, dtype=torch.int64, device=values.device)
        for low, high in ranges:
            digits = bits[low:high] >> shift
            alike = digits[(digits >> DIGIT) == (found >> DIGIT)]
            counts += torch.bincount(alike & ((1 << DIGIT) - 1), minlength=1 << DIGIT)
        for group in groups:
            all_reduce_(counts, group)
        above = counts.flip(0).cumsum(0)  # of digits from the largest down
        at = int((above < place).sum())
        digit = (1 << DIGIT) - 1 - at
        place -= int(above[at - 1]) if at else 0
        found = (found | digit) << (DIGIT if shift else 0)
    return torch.tensor(found, dtype=bits.dtype, device=values.device).view(values.dtype)
