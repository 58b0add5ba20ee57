"""Tensor-parallel layers over Transformer Engine; the names and signatures of `layers_torch`.

Importing this file imports transformer_engine, so only `megarlx.model.layers.layers("te")` does.
Its collectives run inside its own kernels: they are not in `Group.traffic`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
import transformer_engine.pytorch as te
from torch import Tensor
from transformer_engine.common import recipe as te_recipe

from megarlx.comm.groups import Group
from megarlx.model.layers_torch import VocabEmbedding, enter, leave
from megarlx.ops.weight_gradient import adds_by_product

__all__ = [
    "ColumnLinear",
    "RMSNorm",
    "RowLinear",
    "VocabEmbedding",
    "enter",
    "leave",
    "precision",
    "recompute",
]

RECIPES: dict[str, Callable[[], te_recipe.Recipe]] = {
    "delayed": te_recipe.DelayedScaling,
    "current": te_recipe.Float8CurrentScaling,
    "block": te_recipe.Float8BlockScaling,
    "mxfp8": te_recipe.MXFP8BlockScaling,
}


def _leave_empty(parameter: Tensor) -> None:
    """Weights are drawn by `initialise_`, the same for every layout."""


class _Linear(te.Linear):
    """With `delay_weight_gradient`, backward leaves the weight's gradient to `backward_dw`.

    Transformer Engine would put that product in the place of `.grad`, or lose the bias's gradient:
    it is added to `main_grad`, which is `.grad`, and a layer with a bias does not wait.
    """

    READ: ClassVar[tuple[str, ...]] = ()  # features.py
    _by_product = False

    def __init__(
        self, *sizes: int, bias: bool, delay_weight_gradient: bool, **options: Any
    ) -> None:
        self.delays = delay_weight_gradient and not bias
        super().__init__(
            *sizes,
            bias=bias,
            delay_wgrad_compute=self.delays,
            fuse_wgrad_accumulation=self.delays,
            init_method=_leave_empty,
            **options,
        )

    def forward(self, x: Tensor) -> Tensor:
        adds = self._by_product and adds_by_product(self.weight)
        self.fuse_wgrad_accumulation = self.delays or adds
        if self.fuse_wgrad_accumulation:
            self.weight.main_grad = self.weight.grad
        out: Tensor = super().forward(x)
        return out

    def add_by_product(self, on: bool) -> None:
        """As in layers_torch."""
        self._by_product = on


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
        super().__init__(
            in_features,
            out_features,
            delay_weight_gradient=delay_weight_gradient,
            bias=bias,
            parallel_mode="column",
            tp_group=group.process_group,
            tp_size=group.size,
            sequence_parallel=sequence_parallel,
            params_dtype=dtype,
            device=device,
        )


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
        super().__init__(
            in_features,
            out_features,
            delay_weight_gradient=delay_weight_gradient,
            bias=False,
            parallel_mode="row",
            tp_group=group.process_group,
            tp_size=group.size,
            sequence_parallel=sequence_parallel,
            params_dtype=dtype,
            device=device,
        )


class RMSNorm(te.RMSNorm):
    """Over the last dimension; a residual is added to the result."""

    READ: ClassVar[tuple[str, ...]] = ("plus_one",)

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
        super().__init__(
            size,
            eps=eps,
            zero_centered_gamma=plus_one,
            sequence_parallel=sequence_parallel,
            dtype=dtype,
            device=device,
        )
        self.plus_one = plus_one

    @property
    def scale(self) -> Tensor:
        return 1 + self.weight.float() if self.plus_one else self.weight

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = super().forward(x)
        return y if residual is None else residual + y

    def given_mean_square(self, x: Tensor, mean_square: Tensor) -> Tensor:
        """Where x is a part of what is normalised."""
        return x * (mean_square + self.eps).rsqrt() * self.scale


def recompute(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Transformer Engine's own checkpoint, which also replays its fp8 scales."""
    out: Tensor = te.checkpoint(function, *arguments, use_reentrant=False)
    return out


def precision(fp8: str | None, group: Group) -> AbstractContextManager[Any]:
    """The fp8 recipe around a forward; the largest values seen are shared over the group."""
    if fp8 is None:
        return nullcontext()
    if fp8 not in RECIPES:
        raise ValueError(f"model: fp8 is '{fp8}'; allowed: none, {', '.join(RECIPES)}")
    context: AbstractContextManager[Any] = te.autocast(
        enabled=True, recipe=RECIPES[fp8](), amax_reduction_group=group.process_group
    )
    return context
