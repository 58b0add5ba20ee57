"""The engine with its decode products in fp8, for rollouts (decoders/fp8.py).

Prompts go through the model's own layers; sampled tokens come from rounded weights, so their
log-probs are off those of training, and `importance_cap` has to correct for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megarlx.config.own_samples import FP8_GENERATOR
from megarlx.generation.decoders.choose import decoder_of
from megarlx.generation.decoders.in_place import InPlaceDecoder
from megarlx.generation.engine import Engine
from megarlx.model.build import ParallelModel
from megarlx.model.features import features
from megarlx.model.transformer import Stage

GRAIN = 16  # of a matrix' sizes, for the scaled product
FIRST_CAPABILITY = (9, 0)


def without_fp8(stage: Stage) -> str:
    """Why a stage cannot decode with weights in fp8 here; empty where it can."""
    if decoder_of(stage) is not InPlaceDecoder:
        lacking = sorted(features(stage) - (InPlaceDecoder.implements or frozenset()))
        return f"it decodes in place, which does not serve {', '.join(lacking)}"
    return _unfit_card(next(stage.parameters())) or next(_unfit_sizes(stage), "")


def _unfit_card(some: torch.Tensor) -> str:
    if some.device.type != "cuda":
        return ""
    if some.dtype != torch.bfloat16:
        return f"the weights are {some.dtype}; allowed: torch.bfloat16"
    found = torch.cuda.get_device_capability(some.device)
    if found < FIRST_CAPABILITY:
        least = ".".join(map(str, FIRST_CAPABILITY))
        name = torch.cuda.get_device_name(some.device)
        return f"{name} has compute capability {found[0]}.{found[1]}; allowed: {least} or more"
    return ""


def _unfit_sizes(stage: Stage) -> Iterator[str]:
    for name, parameter in stage.layers.named_parameters():
        shape = tuple(parameter.shape)
        if len(shape) == 2 and any(size % GRAIN for size in shape):
            yield f"layers.{name} is {shape[0]} by {shape[1]}; allowed: multiples of {GRAIN}"


def fp8_engine(model: ParallelModel, **options: Any) -> Engine:
    """The generator "engine_fp8"; called as generator_of does."""
    for stage in model.stages:
        if why := without_fp8(stage):
            raise ValueError(f"generate: generator is {FP8_GENERATOR!r}, but {why}")
    return Engine.of(model, fp8=True, **options)
