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

from megarlx.comm import differentiable
from megarlx.comm.groups import Group
from megarlx.ops.delayed_linear import DelayedGradients, delayed_linear
from megarlx.ops.elementwise import rms_norm
from megarlx.ops.product import linear
from megarlx.ops.weight_gradient import added_linear, adds_by_product


class _Linear(nn.Module):
    """With `delay_weight_gradient`, backward leaves the weight's gradient to `backward_dw`."""

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        bias: bool,
        delay_weight_gradient: bool,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(rows, dtype=dtype, device=device)) if bias else None
        self.delayed = DelayedGradients() if delay_weight_gradient else None
        self._by_product = False

    def product(self, x: Tensor) -> Tensor:
        if self.delayed is not None:
            return delayed_linear(x, self.weight, self.bias, self.delayed)
        if self._by_product and adds_by_product(self.weight):
            return added_linear(x, self.weight, self.bias)
        return linear(x, self.weight, self.bias)

    def add_by_product(self, on: bool) -> None:
        """Whether backward may add the weight's gradient to `.grad` by the product itself; else
        autograd adds it."""
        self._by_product = on

    def backward_dw(self) -> None:
        """Adds the oldest weight gradient put off to `.grad`; named as in Transformer Engine."""
        if self.delayed is not None:
            self.delayed.add_oldest(self.weight)


class ColumnLinear(_Linear):
    """[t, in] to [T, out / tp]: the rows of the weight are split."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        group: Group,
        sequence_parallel: bool,
        delay_weight_gradient: bool,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        rows = out_features // group.size
        options: Any = {"dtype": dtype, "device": device}
        super().__init__(
            *(rows, in_features), bias=bias, delay_weight_gradient=delay_weight_gradient, **options
        )
        self.group, self.sequence_parallel = group, sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return self.product(enter(x, self.group, self.sequence_parallel))


class RowLinear(_Linear):
    """[T, in / tp] to [t, out]: the columns of the weight are split and the parts summed."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group: Group,
        sequence_parallel: bool,
        delay_weight_gradient: bool,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        columns = in_features // group.size
        options: Any = {"dtype": dtype, "device": device}
        super().__init__(
            *(out_features, columns),
            bias=False,
            delay_weight_gradient=delay_weight_gradient,
            **options,
        )
        self.group, self.sequence_parallel = group, sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return leave(self.product(x), self.group, self.sequence_parallel)


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
        plus_one: bool,
        sequence_parallel: bool,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.eps, self.sequence_parallel, self.plus_one = eps, sequence_parallel, plus_one
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device))

    @property
    def scale(self) -> Tensor:
        """What is multiplied by. 1 + weight is in fp32 at least: bf16 would round the weight."""
        if not self.plus_one:
            return self.weight
        half = self.weight.dtype in (torch.bfloat16, torch.float16)
        return 1 + (self.weight.float() if half else self.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return rms_norm(x, self.scale, self.eps, residual)

    def given_mean_square(self, x: Tensor, mean_square: Tensor) -> Tensor:
        """Where x is a part of what is normalised."""
        return x * (mean_square + self.eps).rsqrt() * self.scale


def enter(x: Tensor, group: Group, sequence_parallel: bool) -> Tensor:
    """[t, …] into a tensor-parallel part as [T, …]."""
    if sequence_parallel:
        return differentiable.gather_sequence(x, group)
    return differentiable.copy_to_group(x, group)


def leave(x: Tensor, group: Group, sequence_parallel: bool) -> Tensor:
    """[T, …], one summand a rank, out of a tensor-parallel part as [t, …]."""
    if sequence_parallel:
        return differentiable.scatter_sequence(x, group)
    return differentiable.reduce_from_group(x, group)


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
