"""Refuses layouts that cannot work, before any process group is made."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megarlx.comm.groups import Layout
from megarlx.config.model import ModelConfig


class LayoutError(ValueError):
    """A model, a layout and a batch that do not fit together; the message has the numbers."""


def check_layout(
    config: ModelConfig,
    layout: Layout,
    *,
    world_size: int | None = None,
    sequence_length: int | None = None,
    sequence_parallel: bool = False,
    stages_per_rank: int = 1,
    layers_per_stage: Sequence[int] | None = None,
) -> None:
    """Raise LayoutError with every reason and the nearest layouts that do work.

    `stages_per_rank` is the number of pipeline stages a process holds (interleaved schedules);
    `layers_per_stage` is an uneven split of the layers, one number a stage.
    """
    problems = _problems(config, layout, sequence_length, sequence_parallel, stages_per_rank)
    stages = layout.pp * stages_per_rank
    if layers_per_stage is not None:
        if len(layers_per_stage) != stages:
            problems.append(
                f"layers_per_stage has {len(layers_per_stage)} numbers for {stages} stages"
            )
        if sum(layers_per_stage) != config.layers or min(layers_per_stage, default=0) < 0:
            problems.append(
                f"layers_per_stage is {list(layers_per_stage)}; the numbers must be 0 or more and "
                f"add up to the model's {config.layers} layers"
            )
    processes = layout.world_size if world_size is None else world_size
    if layout.world_size != processes:
        problems.append(f"{layout} needs {layout.world_size} processes; there are {processes}")
    if not problems:
        return
    near = [
        candidate
        for candidate in layout.nearest(processes, count=_layouts_at_most(processes))
        if not _problems(config, candidate, sequence_length, sequence_parallel, stages_per_rank)
    ][:3]
    works = "; ".join(map(str, near)) or "none with these settings"
    raise LayoutError(
        f"the layout {layout} does not work: {'; '.join(problems)}. "
        f"Nearest for {processes} processes: {works}"
    )


def layers_of_stage(
    config: ModelConfig, stages: int, layers_per_stage: Sequence[int] | None = None
) -> list[range]:
    """The layers of every stage; without a given split, the first stages take the remainder."""
    if layers_per_stage is None:
        each, more = divmod(config.layers, stages)
        layers_per_stage = [each + (index < more) for index in range(stages)]
    ranges, begin = [], 0
    for count in layers_per_stage:
        ranges.append(range(begin, begin + count))
        begin += count
    return ranges


def _problems(
    config: ModelConfig,
    layout: Layout,
    sequence_length: int | None,
    sequence_parallel: bool,
    stages_per_rank: int,
) -> list[str]:
    tp, stages = layout.tp, layout.pp * stages_per_rank
    problems = []
    if config.heads % tp:
        problems.append(f"{config.heads} heads cannot be split over tp={tp}")
    if config.kv_heads % tp and tp % config.kv_heads:
        problems.append(
            f"{config.kv_heads} kv_heads can neither be split over nor copied evenly to tp={tp}"
        )
    if config.intermediate_size % tp:
        problems.append(
            f"intermediate_size {config.intermediate_size} cannot be split over tp={tp}"
        )
    if stages > config.layers:
        problems.append(f"{config.layers} layers are fewer than {stages} pipeline stages")
    if sequence_parallel and sequence_length is not None and sequence_length % tp:
        problems.append(
            f"a sequence of {sequence_length} tokens cannot be split over tp={tp} "
            f"(sequence parallel); nearest: {sequence_length // tp * tp} or "
            f"{-(-sequence_length // tp) * tp}"
        )
    return problems


def _layouts_at_most(processes: int) -> int:
    """An upper bound on the ways to write a number as a product of four."""
    return max(1, math.comb(processes.bit_length() + 3, 3)) ** 2 * 8
