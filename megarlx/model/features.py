"""What a built stage computes with, read from its modules: nobody writes it down a second time.

A feature is `Class.attribute=value`. The values are the classes of the modules inside a module, the
functions that it holds and calls, and the switches that it branches on; of a number only that it is
one. What a faster decoder, a plan or a conversion relies on it lists (megarlx/config/families.py
has what ships); a feature that it does not list it does not know, and it leaves the stage alone or
refuses it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
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
    for module in _modules(stage):
        found.update(_of_module(module))
    return frozenset(found)


def _modules(module: nn.Module) -> Iterator[nn.Module]:
    """Itself and what is inside of it, but not inside of another package's layer: the class of ours
    that is made of one says in `READ` which attributes tell what it computes."""
    yield module
    if not hasattr(module, "READ"):
        for child in module.children():
            yield from _modules(child)


def features_of(config: ModelConfig) -> frozenset[str]:
    """Of the model that `config` is built as, whole, on no device."""
    return _features_of(config)


@functools.lru_cache(maxsize=64)
def _features_of(config: ModelConfig) -> frozenset[str]:
    return features(Stage(config, device="meta"))


def _of_module(module: nn.Module) -> Iterator[str]:
    if isinstance(module, nn.ModuleDict | nn.ModuleList):
        return
    owner = type(module).__name__
    read: tuple[str, ...] | None = getattr(type(module), "READ", None)
    if read is not None:
        for attribute in read:
            yield from _of_value(f"{owner}.{attribute}", getattr(module, attribute))
        return
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
