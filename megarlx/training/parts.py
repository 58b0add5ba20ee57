"""This rank's shard in parts, as an update rule sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from megarlx import plug
from megarlx.config.optimizer import OptimizerConfig
from megarlx.parallel.data_parallel import DataParallel
from megarlx.training.whole_tensors import WholeTensors

EMBEDDING = "embedding.weight"
Kind = Literal["matrices", "embedding", "vectors"]  # of parameters, by their weight decay


@dataclass(frozen=True)
class UpdateSettings:
    """What does not change from step to step, for one objective."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_embeddings: bool = True
    clip_norm: float | None = 1.0
    rule: str = "adamw"  # one of ours, or module:Class
    rule_options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @staticmethod
    def of(config: OptimizerConfig) -> UpdateSettings:
        return UpdateSettings(
            config.betas,
            config.eps,
            config.weight_decay,
            config.decay_embeddings,
            config.clip_norm or None,
            config.rule,
            config.rule_options,
        )

    def decay_of(self, kind: Kind) -> float:
        if kind == "vectors" or (kind == "embedding" and not self.decay_embeddings):
            return 0.0
        return self.weight_decay

    @property
    def whole_rule(self) -> str:
        return plug.whole("update rule", self.rule)


class Range(NamedTuple):
    """A part of the shard that is treated alike; all in a row are the shard, padding too."""

    part: slice
    weight_decay: float
    whole: bool = False  # of tensors that the rule sees as whole matrices


@dataclass(frozen=True)
class Parts:
    """[P] is the shape of a shard."""

    master: Tensor
    ranges: Sequence[Range]
    wholes: WholeTensors | None = None
    buffer: Tensor | None = None

    def room(self) -> Tensor:
        """[P], where a rule may write its update: the same memory at each step, where there is."""
        return torch.empty_like(self.master) if self.buffer is None else self.buffer

    def on_whole(self, values: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """[P] with the elements of `function(tensor)`, a tensor of the same shape, for each tensor
        that the rule sees whole; 0 elsewhere. Called by all ranks together.

        Every projection comes alone, without copies, put together over data and tensor
        parallelism, and is computed once, on one rank.
        """
        if self.wholes is None:
            return torch.zeros_like(values)
        return self.wholes.changed(values, function)


def kinds(data_parallel: DataParallel, *, embedding_apart: bool) -> Iterator[tuple[slice, Kind]]:
    """The parts of the shard that decay alike; empty ones are left out."""
    layout = data_parallel.layout
    border = layout.decayed_shard_size
    bounds: list[tuple[int, int, Kind]] = []
    at = 0
    for low, high in data_parallel.ranges_of(EMBEDDING) if embedding_apart else ():
        bounds += [(at, low, "matrices"), (low, high, "embedding")]
        at = high
    bounds += [(at, border, "matrices"), (border, layout.shard_size, "vectors")]
    for low, high, kind in bounds:
        if low < high:
            yield slice(low, high), kind


def with_wholes(ranges: Sequence[Range], wholes: Sequence[tuple[int, int]]) -> list[Range]:
    """`ranges` cut at `wholes`, which are bounds in order; what they cover is whole."""
    found: list[Range] = []

    def add(low: int, high: int, decay: float, whole: bool) -> None:
        last = found[-1] if found else None
        if low < high and last is not None and last[1:] == (decay, whole):
            found[-1] = Range(slice(last.part.start, high), decay, whole)
        elif low < high:
            found.append(Range(slice(low, high), decay, whole))

    for part, decay, _ in ranges:
        at = part.start
        for low, high in wholes:
            low, high = max(low, part.start), min(high, part.stop)
            if low < high:
                add(at, low, decay, whole=False)
                add(low, high, decay, whole=True)
                at = high
        add(at, part.stop, decay, whole=False)
    return found


def first_non_finite(data_parallel: DataParallel, shard: Tensor) -> str | None:
    """The first tensor of the model that has a number in this shard that is not finite."""
    for piece, start, block in data_parallel.layout.chunks(
        data_parallel.layouts, data_parallel.group.rank
    ):
        if not torch.isfinite(shard[start : start + prod(block.size)]).all():
            return piece.name
    return None
