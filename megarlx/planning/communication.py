"""The bytes that one training step sends on each axis, from the layout alone.

The same ring formulas as `megarlx.comm.groups.bytes_sent`, so that what is planned can be compared
with what was counted, rank by rank and to the byte.

Letters: T tokens of a micro-batch, H hidden size, n ranks of an axis.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod

from megarlx.comm.groups import Layout, bytes_sent
from megarlx.config.model import ModelConfig
from megarlx.model.metadata import TensorParallel, parameter_layouts
from megarlx.parallel.data_parallel import FlatLayout
from megarlx.parallel.metadata import ParameterLayout
from megarlx.parallel.pipeline_plan import PipelinePlan

Sent = Counter[tuple[str, str]]  # (axis, operation) -> bytes


@dataclass(frozen=True)
class StepShape:
    """What one step does, as far as messages depend on it."""

    tokens_per_microbatch: int
    microbatches: int
    sequence_parallel: bool = False
    recompute: str = "none"
    element_bytes: int = 4  # of weights and activations
    wide_bytes: int = 4  # of gradients, losses and sums: 8 in fp64 runs
    objectives: int = 1
    rows_per_chunk: int = 512  # of the loss
    bucket_elements: int = 25_000_000
    # Of layouts with replicas: whether each trains one objective, and of how many.
    in_replicas: bool = False
    of_replicas: int = 1
    local_steps: bool = False  # each objective goes by itself between averages
    averages: float = 1.0  # the share of the steps that end with one
    shared_moments: bool = False
    linear: bool = True  # the combination is a sum; else every replica gets all shards


def bytes_per_step(
    config: ModelConfig, layout: Layout, plan: PipelinePlan, step: StepShape, rank: int
) -> Sent:
    """What `rank` sends in one step of every objective, training on all of them."""
    one = objective_bytes(config, layout, plan, step, rank)
    total: Sent = Counter({k: v * step.objectives for k, v in one.items()})
    return total + update_bytes(config, layout, plan, step, rank)


def objective_bytes(
    config: ModelConfig, layout: Layout, plan: PipelinePlan, step: StepShape, rank: int
) -> Sent:
    """Forward and backward of one objective, and the reduction of its gradients."""
    place = layout.coordinates(rank)
    forward_backward: Sent = Counter()
    for stage in plan.stages_of(place["pp"]):
        first, last = plan.layers[stage]
        ends = {"embedding": stage == 0, "head": stage == plan.stages - 1}
        split = step.sequence_parallel and layout.tp > 1
        stage_bytes = _stage(config, layout.tp, step, last - first, split, ends)
        for key, sent in stage_bytes.items():
            forward_backward[key] += sent * step.microbatches
    forward_backward += _pipeline(config, layout, plan, step, place["pp"])
    return forward_backward + _gradients(_held(config, layout, plan, step, rank), layout, step)


def update_bytes(
    config: ModelConfig, layout: Layout, plan: PipelinePlan, step: StepShape, rank: int
) -> Sent:
    """The update of all objectives, once a step; between averages the mean of the steps."""
    return _optimizer(_held(config, layout, plan, step, rank), layout, step)


def _held(
    config: ModelConfig, layout: Layout, plan: PipelinePlan, step: StepShape, rank: int
) -> dict[str, ParameterLayout]:
    place = layout.coordinates(rank)
    tp = TensorParallel(layout.tp, place["tp"], step.sequence_parallel and layout.tp > 1)
    layouts: dict[str, ParameterLayout] = {}
    for stage in plan.stages_of(place["pp"]):
        first, last = plan.layers[stage]
        ends = {"embedding": stage == 0, "head": stage == plan.stages - 1}
        layouts |= parameter_layouts(config, tp, first=first, last=last, **ends)
    return layouts


def _stage(
    config: ModelConfig,
    n: int,
    step: StepShape,
    layers: int,
    sequence_parallel: bool,
    ends: Mapping[str, bool],
) -> Sent:
    """One micro-batch through one stage, forward and backward, over tensor parallelism."""
    sent: Sent = Counter()
    hidden = step.tokens_per_microbatch * config.hidden_size * step.element_bytes

    def add(operation: str, tensor_bytes: int, times: int = 1) -> None:
        sent["tp", operation] += bytes_sent(operation, n, tensor_bytes) * times

    def enter_and_leave(forwards: int, backwards: int, enter: int, leave: int) -> None:
        """Entering a tensor-parallel part and leaving it, `enter` and `leave` times a pass."""
        if sequence_parallel:
            add("all_gather", hidden, forwards * enter + backwards * leave)
            add("reduce_scatter", hidden, forwards * leave + backwards * enter)
        else:
            add("all_reduce", hidden, forwards * leave + backwards * enter)

    full, selective = step.recompute == "full", step.recompute == "selective"
    enter_and_leave(layers, layers, 2, 2)
    if full:
        # Run again up to the last thing that backward needs: behind the MLP that is only a norm.
        enter_and_leave(layers, 0, 2, 1 if config.norm_position == "pre" else 2)
    if config.qk_norm == "full":
        sums = step.tokens_per_microbatch * 2 * step.wide_bytes
        add("all_reduce", sums, layers * (3 if full or selective else 2))
    if ends["embedding"]:
        enter_and_leave(1, 1, 0, 1)
    if ends["head"]:
        enter_and_leave(1, 1, 1, 0)
        left = step.tokens_per_microbatch
        while left > 0:
            rows = min(step.rows_per_chunk, left)
            add("all_reduce", rows * step.wide_bytes)  # maxima
            add("all_reduce", 3 * rows * step.wide_bytes)  # sums
            left -= rows
    return sent


def _pipeline(
    config: ModelConfig, layout: Layout, plan: PipelinePlan, step: StepShape, rank: int
) -> Sent:
    split = layout.tp if step.sequence_parallel else 1
    tokens = step.tokens_per_microbatch // split
    forward, backward = plan.sends_per_step(rank, step.microbatches)
    size = tokens * config.hidden_size * step.element_bytes
    return Counter(
        {("pp", "send_hidden"): forward * size, ("pp", "send_gradient"): backward * size}
    )


def _gradients(layouts: Mapping[str, ParameterLayout], layout: Layout, step: StepShape) -> Sent:
    """Partial gradients made whole, then reduced over data parallelism; weight and tokens."""
    sent: Sent = Counter()
    parts = sum(
        prod(piece.shape) * (layout.tp // len(piece.replicated_over))
        for parameter in layouts.values()
        for piece in parameter.pieces
        if piece.sum_gradients
    )
    sent["tp", "all_reduce"] += bytes_sent("all_reduce", layout.tp, parts * step.wide_bytes)
    tied = [p for p in layouts.values() if p.tied]
    if len(tied) == 1 and layout.pp > 1:
        whole = prod(tied[0].shape) * step.wide_bytes
        sent["embedding", "all_reduce"] += bytes_sent("all_reduce", 2, whole)
    flat = _flat(layouts, layout, step)
    for start, stop in flat.buckets:
        whole = (stop - start) * step.wide_bytes
        sent["dp", "reduce_scatter"] += bytes_sent("reduce_scatter", layout.dp, whole)
    if layout.replica > 1 and not step.in_replicas:  # replicas have nothing else to be
        shard = flat.shard_size * step.wide_bytes
        sent["replica", "all_reduce"] += bytes_sent("all_reduce", layout.replica, shard)
        trainers = layout.replica * layout.dp
        sent["replica+dp", "all_reduce"] += bytes_sent("all_reduce", trainers, 2 * 8)
    else:
        sent["dp", "all_reduce"] += bytes_sent("all_reduce", layout.dp, 2 * 8)
    return sent


def _optimizer(layouts: Mapping[str, ParameterLayout], layout: Layout, step: StepShape) -> Sent:
    """The gradient norms over every axis and the new weights, once a step; between replicas norms,
    flags, a barrier and the updates."""
    sent: Sent = Counter()
    norms = step.objectives + step.shared_moments  # of what is mixed, too
    for axis, size in (("dp", layout.dp), ("tp", layout.tp), ("pp", layout.pp)):
        sent[axis, "all_reduce"] += bytes_sent("all_reduce", size, 8 * norms)
    flat = _flat(layouts, layout, step)
    # With steps of their own each objective has weights of its own, and at an average all have.
    gathers = step.objectives + step.averages if step.local_steps else 1
    for start, stop in flat.buckets:
        whole = (stop - start) * step.element_bytes
        sent["dp", "all_gather"] += int(gathers * bytes_sent("all_gather", layout.dp, whole))
    if step.in_replicas:
        shard = flat.shard_size * step.wide_bytes
        operation = "all_reduce" if step.linear else "all_gather"
        whole = shard if step.linear else layout.replica * shard
        update = bytes_sent(operation, layout.replica, whole)
        sent["replica", operation] += int(step.averages * update)
        for scalars in (2 * 8 * step.of_replicas, 8):
            sent["replica", "all_reduce"] += bytes_sent("all_reduce", layout.replica, scalars)
    return sent


def _flat(layouts: Mapping[str, ParameterLayout], layout: Layout, step: StepShape) -> FlatLayout:
    order = [(name, p.shape, p.weight_decay) for name, p in layouts.items()]
    return FlatLayout.make(order[::-1], layout.dp, step.bucket_elements)


def gigabytes(config: ModelConfig, layout: Layout, step: StepShape) -> float:
    """The largest number of gigabytes that any one rank sends in a step."""
    plan = PipelinePlan.make(config.layers, layout.pp)
    most = max(
        sum(bytes_per_step(config, layout, plan, step, rank).values())
        for rank in range(layout.world_size)
    )
    return ceil(most / 1e6) / 1e3
