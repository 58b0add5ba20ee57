"""Tensor-parallel layers in plain torch. `layers_te` has the same names and signatures.

Under sequence parallelism what lies between two tensor-parallel parts is split over tokens:
column-parallel layers gather the tokens, row-parallel ones scatter their sum.

Letters: T tokens, t the tokens held by one rank (T, or T / tp under sequence parallelism).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megarlx.comm import collectives
from megarlx.comm.groups import Group
from megarlx.ops.elementwise import rms_norm


class ColumnLinear(nn.Module):
    """[t, in] to [T, out / tp]: the rows of the weight are split."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        group: Group,
        sequence_parallel: bool,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.group, self.sequence_parallel = group, sequence_parallel
        rows = out_features // group.size
        self.weight = nn.Parameter(torch.empty(rows, in_features, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(rows, dtype=dtype, device=device)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(enter(x, self.group, self.sequence_parallel), self.weight, self.bias)


class RowLinear(nn.Module):
    """[T, in / tp] to [t, out]: the columns of the weight are split and the parts summed."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group: Group,
        sequence_parallel: bool,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.group, self.sequence_parallel = group, sequence_parallel
        columns = in_features // group.size
        self.weight = nn.Parameter(torch.empty(out_features, columns, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return leave(F.linear(x, self.weight), self.group, self.sequence_parallel)


class VocabEmbedding(nn.Module):
    """Token ids [T] to [t, hidden]: every rank has a range of ids and adds zero for the others."""

    def __init__(
        self,
        padded_vocab: int,
        hidden_size: int,
        *,
        group: Group,
        sequence_parallel: bool,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.group, self.sequence_parallel = group, sequence_parallel
        rows = padded_vocab // group.size
        self.weight = nn.Parameter(torch.empty(rows, hidden_size, dtype=dtype, device=device))

    def forward(self, tokens: Tensor) -> Tensor:
        if self.group.size == 1:
            return F.embedding(tokens, self.weight)
        rows = len(self.weight)
        local = tokens - self.group.rank * rows
        elsewhere = (local < 0) | (local >= rows)
        found = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        part = found.masked_fill(elsewhere[:, None], 0)
        return leave(part, self.group, self.sequence_parallel)


class RMSNorm(nn.Module):
    """Over the last dimension; a residual is added to the result."""

    def __init__(
        self,
        size: int,
        *,
        eps: float,
        sequence_parallel: bool,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.eps, self.sequence_parallel = eps, sequence_parallel
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return rms_norm(x, self.weight, self.eps, residual)


def enter(x: Tensor, group: Group, sequence_parallel: bool) -> Tensor:
    """[t, …] into a tensor-parallel part as [T, …]."""
    if sequence_parallel:
        return collectives.gather_sequence(x, group)
    return collectives.copy_to_group(x, group)


def leave(x: Tensor, group: Group, sequence_parallel: bool) -> Tensor:
    """[T, …], one summand a rank, out of a tensor-parallel part as [t, …]."""
    if sequence_parallel:
        return collectives.scatter_sequence(x, group)
    return collectives.reduce_from_group(x, group)


def recompute(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Keep only the arguments and run the function again in backward. No layer draws randomness."""
    out: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return out


def precision(fp8: str | None, group: Group) -> AbstractContextManager[Any]:
    if fp8 is not None:
        raise ValueError(
            f"model: fp8 is '{fp8}', but the torch layers have none; allowed: none, "
            "or the Transformer Engine layers"
        )
    return nullcontext()
