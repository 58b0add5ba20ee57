"""What a built stage computes with, read from its modules: nobody writes it down a second time.

A feature is `Class.attribute=value`. The values are the classes of the modules inside a module, the
functions that it holds and calls, and the switches that it branches on; of a number only that it is
one. What a faster decoder, a plan or a conversion relies on it lists; a feature that it does not
list is one that it does not know, and it leaves the stage alone or refuses it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import fields
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from megarlx.config.model import ModelConfig
from megarlx.model.attention_form import AttentionForm
from megarlx.model.transformer import Stage

# What torch gives every module, and what says which part of the model a stage is.
NOT_READ = frozenset((*vars(nn.Module()), "config", "layouts", "first", "last"))


def features(stage: Stage) -> frozenset[str]:
    some = next(stage.parameters())
    found = {
        f"Stage.device={some.device.type}",
        f"Stage.dtype={str(some.dtype).removeprefix('torch.')}",
        f"Stage.splits_heads={stage.group.size > 1}",
    }
    for module in stage.modules():
        found.update(_of_module(module))
    return frozenset(found)


def features_of(config: ModelConfig) -> frozenset[str]:
    """Of the model that `config` is built as, whole, on no device."""
    return _features_of(config)


@functools.lru_cache(maxsize=64)
def _features_of(config: ModelConfig) -> frozenset[str]:
    return features(Stage(config, device="meta"))


def listed(**classes: str) -> frozenset[str]:
    """`Layer="attention=model.transformer_layer.Attention norm_position=pre|post"` and the like."""
    return frozenset(
        f"{name}.{attribute}={value}"
        for name, text in classes.items()
        for attribute, _, values in (part.partition("=") for part in text.split())
        for value in values.split("|")
    )


# The layers of a transformer with SwiGLU, RMSNorm before or after, and plain causal attention.
PLAIN_LAYERS = listed(
    Stage="backend=model.layers_torch fp8=None recompute=none|selective|full radians=dict "
    "has_embedding=True|False has_head=True|False sequence_parallel=False group=comm.groups.Group "
    "embedding_scale=None final_cap=None embedding=model.layers_torch.VocabEmbedding "
    "head=model.layers_torch.VocabEmbedding norm=model.layers_torch.RMSNorm "
    "layers=model.transformer_layer.Layer",
    Layer="norm_position=pre|post rope_theta=number attention=model.transformer_layer.Attention "
    "mlp=model.transformer_layer.MLP attention_norm=model.layers_torch.RMSNorm "
    "mlp_norm=model.layers_torch.RMSNorm",
    Attention="heads=number kv_heads=number head_dim=number qk_norm=none|per_head|full "
    "spans_ranks=False spanned=tuple group=comm.groups.Group rotate=model.rope.rotate "
    "recompute=None|model.layers_torch.recompute qkv=model.layers_torch.ColumnLinear "
    "o=model.layers_torch.RowLinear q_norm=model.layers_torch.RMSNorm "
    "k_norm=model.layers_torch.RMSNorm core=model.core_attention.CoreAttention",
    CoreAttention="attend=model.attention.attention form.scale=number form.window=None "
    "form.cap=None kind=auto|flash|sdpa|blocks kernel=auto|flash|sdpa|blocks packed=None",
    MLP="activation=ops.elementwise.swiglu recompute=True|False "
    "gate_up=model.layers_torch.ColumnLinear down=model.layers_torch.RowLinear",
    RMSNorm="eps=number plus_one=False sequence_parallel=False weight=Parameter",
    ColumnLinear="weight=Parameter bias=Parameter|None group=comm.groups.Group "
    "sequence_parallel=False delayed=None|ops.delayed_linear.DelayedGradients",
    RowLinear="weight=Parameter bias=None group=comm.groups.Group sequence_parallel=False "
    "delayed=None|ops.delayed_linear.DelayedGradients",
    VocabEmbedding="weight=Parameter group=comm.groups.Group sequence_parallel=False",
)


def shown(unknown: Iterable[str]) -> str:
    return ", ".join(sorted(unknown))


# And what Gemma 2 and 3 have besides.
WINDOWS_AND_CAPS = listed(
    Stage="embedding_scale=number final_cap=number",
    Layer="norm_position=both attention_out_norm=model.layers_torch.RMSNorm "
    "mlp_out_norm=model.layers_torch.RMSNorm",
    CoreAttention="form.window=number form.cap=number",
    MLP="activation=ops.elementwise.geglu",
    RMSNorm="plus_one=True",
)
# All that ships, as `features_of` builds it.
ON_NO_DEVICE = (
    PLAIN_LAYERS | WINDOWS_AND_CAPS | listed(Stage="device=meta dtype=float32 splits_heads=False")
)


def _of_module(module: nn.Module) -> Iterator[str]:
    if isinstance(module, nn.ModuleDict | nn.ModuleList):
        return
    owner = type(module).__name__
    for attribute, value in vars(module).items():
        if attribute not in NOT_READ and not attribute.startswith("_"):
            yield from _of_value(f"{owner}.{attribute}", value)
    for attribute, parameter in module.named_parameters(recurse=False):
        yield f"{owner}.{attribute}={type(parameter).__name__}"
    for attribute, child in module.named_children():
        yield from _of_child(f"{owner}.{attribute}", child)


def _of_child(place: str, child: nn.Module) -> Iterator[str]:
    if not isinstance(child, nn.ModuleDict | nn.ModuleList):
        yield f"{place}={_place(type(child))}"
    for inner in child.children() if isinstance(child, nn.ModuleDict | nn.ModuleList) else ():
        yield from _of_child(place, inner)


def _of_value(place: str, value: Any) -> Iterator[str]:
    if isinstance(value, AttentionForm):
        for field in fields(value):
            yield from _of_value(f"{place}.{field.name}", getattr(value, field.name))
    elif value is None or isinstance(value, bool | str):
        yield f"{place}={value}"
    elif isinstance(value, int | float):
        yield f"{place}=number"
    elif isinstance(value, torch.dtype | torch.device | Tensor | dict | tuple | list):
        yield f"{place}={type(value).__name__}"
    elif isinstance(value, functools.partial):
        yield f"{place}=partial:{_place(value.func)}"
    elif callable(value) or isinstance(value, ModuleType):
        yield f"{place}={_place(value)}"
    else:
        yield f"{place}={_place(type(value))}"


def _place(thing: Any) -> str:
    """Where a class, a function or a module is defined; of ours, within the package."""
    name = thing.__name__ if isinstance(thing, ModuleType) else None
    module = getattr(thing, "__module__", type(thing).__module__)
    qualified = getattr(thing, "__qualname__", type(thing).__qualname__)
    return (name or f"{module}.{qualified}").removeprefix("megarlx.")
