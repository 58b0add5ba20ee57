"""Rotary position embedding, standard and with Llama 3's frequency scaling.

Letters: T tokens of all documents in one row after another, D head_dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megarlx.config.model import ModelConfig, RopeScaling


def frequencies(config: ModelConfig, theta: float) -> Tensor:
    """[D/2] radians per position, in fp32 as every published model computes them.

    A base that layers with a window have for themselves is not scaled: they see no farther.

    Made on the CPU whatever the model runs on: powers differ in the last bit between devices.
    """
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float()
    plain = 1.0 / (theta ** (steps / config.head_dim))
    if config.rope_scaling is None or theta != config.rope_theta:
        return plain
    return _scaled(plain, config.rope_scaling)


def _scaled(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Slow waves are slowed by `factor`, fast ones kept, those between are blended."""
    wavelength = 2 * math.pi / plain
    longest = scaling.original_max_position / scaling.low_freq_factor
    shortest = scaling.original_max_position / scaling.high_freq_factor
    keep = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - keep) * plain / scaling.factor + keep * plain
    slowed = torch.where(wavelength > longest, plain / scaling.factor, plain)
    between = (wavelength <= longest) & (wavelength >= shortest)
    return torch.where(between, blended, slowed)


Rotation = tuple[Tensor, Tensor]


def rotation(positions: Tensor, radians: Tensor, dtype: torch.dtype) -> Rotation:
    """cos and sin, each [T, 1, D/2], of the given positions.

    In fp64 where the model is: fp32 cos and sin differ by 1e-7 between a CPU and a GPU.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    angle = positions[:, None, None].to(wide) * radians
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[T, heads, D]: the pair (i, i + D/2) turned by its angle, written once."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out


class _Rotate(torch.autograd.Function):
    """Rotation; its backward is the rotation the other way, so nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D] turned by cos, sin [T, 1, D/2]."""
    return _Rotate.apply(x, cos, sin)
