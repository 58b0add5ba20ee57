"""Collectives that autograd sees through: each says what its backward sends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megarlx.comm.collectives import (
    all_gather,
    all_reduce_,
    check_divisible,
    dimension_of,
    reduce_scatter,
)
from megarlx.comm.groups import Group


def copy_to_group(x: Tensor, group: Group) -> Tensor:
    """Identity; the backward sums gradients: x is used by every rank, each with its own part."""
    return x if group.size == 1 else _CopyToGroup.apply(x, group)


def reduce_from_group(x: Tensor, group: Group) -> Tensor:
    """Sum over the ranks; the backward is the identity: every rank goes on with the same sum."""
    return x if group.size == 1 else _ReduceFromGroup.apply(x, group)


def gather_from_group(x: Tensor, group: Group, dim: int = -1) -> Tensor:
    """All-gather; the backward keeps this rank's slice."""
    if group.size == 1:
        return x
    return _GatherFromGroup.apply(x, group, dimension_of("gather_from_group", x, dim))


def scatter_to_group(x: Tensor, group: Group, dim: int = -1) -> Tensor:
    """This rank's slice; the backward gathers the slices of the gradient."""
    if group.size == 1:
        return x
    dim = dimension_of("scatter_to_group", x, dim)
    check_divisible("scatter_to_group", x, group, dim)
    return _ScatterToGroup.apply(x, group, dim)


def gather_sequence(x: Tensor, group: Group) -> Tensor:
    """All-gather of dim 0; the backward sums and scatters: each rank uses the whole its own way."""
    return x if group.size == 1 else _GatherSequence.apply(x, group)


def scatter_sequence(x: Tensor, group: Group) -> Tensor:
    """Sum over the ranks, this rank's part of dim 0; the backward gathers."""
    if group.size == 1:
        return x
    check_divisible("scatter_sequence", x, group, 0)
    return _ScatterSequence.apply(x, group)


def _own_slice(x: Tensor, group: Group, dim: int) -> Tensor:
    width = x.shape[dim] // group.size
    return x.narrow(dim, group.rank * width, width).contiguous()


def _summed(x: Tensor, group: Group) -> Tensor:
    # A copy: neither an input nor an incoming gradient is ours to write to.
    return all_reduce_(x.detach().clone(memory_format=torch.contiguous_format), group)


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.group), None


class _ReduceFromGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _GatherFromGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return all_gather(x, group, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _own_slice(gradient, ctx.group, ctx.dim), None, None


class _ScatterToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _own_slice(x, group, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(gradient, ctx.group, ctx.dim), None, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(gradient, ctx.group), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_gather(gradient, ctx.group), None
