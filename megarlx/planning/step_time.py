"""A roofline of one training step: nothing here is measured on the layout that is planned.

Modelled on the busiest rank: every matrix product (arithmetic or bytes, whichever is longer),
attention, passes over activations, recomputation, adding weight gradients to their fp32 buffer,
tensor-parallel collectives (never overlapped), pipeline sends and bubble, the reduction of the
gradients (overlapped with the last backward where the code does that), the optimizer, the gather
of the weights (not overlapped). Not modelled: launches of small kernels, data, logging, saving,
stragglers, evaluation.

Letters as in activations.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from megarlx.comm.hardware import Arithmetic, Gpu
from megarlx.planning.activations import Widths
from megarlx.planning.communication import Sent, objective_bytes, update_bytes
from megarlx.planning.job import Job
from megarlx.planning.pieces import Sizes


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of all objectives; what overlaps with something else is not in it."""

    products: float
    attention: float
    passes: float
    recomputation: float
    tensor_links: float
    pipeline_links: float
    bubble: float
    data_links: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class _Microbatch:
    """Seconds of one micro-batch through all stages of a rank, forward and backward."""

    products: float
    attention: float
    passes: float
    recomputation: float


def step_time(job: Job, gpu: Gpu) -> StepTime:
    """Of the objectives of the slowest rank; in replicas the others wait for it."""
    return max(
        (_time_of(job, gpu, rank) for rank in _first_ranks(job)), key=lambda time: time.total
    )


def _first_ranks(job: Job) -> list[int]:
    """One of each set of objectives."""
    replicas = range(job.replica if job.in_replicas else 1)
    return [job.layout.rank_at(pp=0, replica=r, dp=0, tp=0) for r in replicas]


def _time_of(job: Job, gpu: Gpu, rank: int) -> StepTime:
    """Each of the rank's objectives through its pipeline, and then the update."""
    replica = job.layout.coordinates(rank)["replica"]
    kinds = [job.layout.rank_at(pp=pp, replica=replica, dp=0, tp=0) for pp in job.kinds()]
    total = dict.fromkeys(StepTime.__dataclass_fields__, 0.0)
    for one in job.trained_on(rank):
        times = one.objectives * one.share_of_steps
        for part, seconds in vars(_objective_time(one, gpu, kinds)).items():
            total[part] += times * seconds
    busiest, _ = _busiest(job.trained_on(rank)[0], gpu, kinds)
    total["data_links"] += _update_links(job, gpu, busiest)
    total["optimizer"] = _optimizer(job, gpu, busiest)
    return StepTime(**total)


def _busiest(job: Job, gpu: Gpu, ranks: list[int]) -> tuple[int, _Microbatch]:
    return max(
        ((rank, _microbatch(job, gpu, rank)) for rank in ranks),
        key=lambda pair: sum(vars(pair[1]).values()),
    )


def _objective_time(job: Job, gpu: Gpu, ranks: list[int]) -> StepTime:
    """Forward and backward of one objective, and the reduction of its gradients."""
    rounds = job.microbatches
    busiest, microbatch = _busiest(job, gpu, ranks)
    sent = objective_bytes(job.model, job.layout, job.plan, job.step_shape, busiest)
    tensor = _tensor_links(job, gpu, sent, busiest)
    pipeline = _pipeline_links(job, gpu, sent, busiest)
    work = rounds * sum(vars(microbatch).values()) + tensor + pipeline
    idle = job.plan.bubble_fraction(job.microbatches)
    last_backward = 2 / 3 * (microbatch.products + microbatch.attention + microbatch.passes)
    return StepTime(
        products=rounds * microbatch.products,
        attention=rounds * microbatch.attention,
        passes=rounds * microbatch.passes,
        recomputation=rounds * microbatch.recomputation,
        tensor_links=tensor,
        pipeline_links=pipeline,
        bubble=work * idle / (1 - idle),
        data_links=_reduction(job, gpu, sent, busiest, last_backward),
        optimizer=0.0,
    )


def mfu(job: Job, gpu: Gpu, seconds: float) -> float:
    """The model's own arithmetic, without recomputation, as a share of all GPUs' peak."""
    return job.flops_per_step / (seconds * job.gpus * gpu.flops)


def _microbatch(job: Job, gpu: Gpu, rank: int) -> _Microbatch:
    n = Widths.of(job)
    stages = list(job.stages(job.layout.coordinates(rank)["pp"]))
    layers = sum(stage.layers for stage in stages)
    shapes = ((n.h, n.q + 2 * n.k), (n.q, n.h), (n.h, 2 * n.F), (n.F, n.h))
    kind: Arithmetic = "fp8" if job.fp8 else job.arithmetic
    forward = layers * sum(gpu.product_seconds(n.T, a, b, n.e, kind) for a, b in shapes)
    seen = job.model.keys_seen(job.seen_length)
    attention = layers * gpu.attention_seconds(4 * n.q * n.T * seen, job.arithmetic)
    heads = n.T * (3 * n.q + 5 * n.k) * n.e if job.model.qk_norm != "none" else 0
    heads += n.T * (2 * n.q + 3 * n.k) * n.e  # rotation
    swiglu = n.T * 5 * n.F * n.e
    norms = (10 if job.model.norm_position == "both" else 6) * n.t * n.h * n.e
    passes = layers * gpu.pass_seconds(norms + heads + swiglu)
    again = {
        "none": 0.0,
        "selective": attention + layers * gpu.pass_seconds(heads + swiglu),
        "full": forward + attention + passes,
    }[job.recompute]
    head = accumulated = 0.0
    if any(stage.head for stage in stages):
        # Logits and both gradients from them; then the logits are written and read once more.
        head = 3 * gpu.product_seconds(n.T, n.h, n.V, n.e, job.arithmetic)
        passes += gpu.pass_seconds(n.T * n.V * 2 * n.w) / 3
    held = _sizes(job, rank).parameters
    moved = 3 * n.w if n.e == n.w else n.e + 4 * n.w
    accumulated = gpu.pass_seconds(held * moved)
    # Backward: two products for one, attention two and a half times, passes twice.
    return _Microbatch(3 * forward + head, 3.5 * attention, 3 * passes + accumulated, again)


def _tensor_links(job: Job, gpu: Gpu, sent: Sent, rank: int) -> float:
    if job.tp == 1:
        return 0.0
    seconds = _bytes_on(sent, "tp") / gpu.link_bandwidth(1, job.tp)
    stages = list(job.stages(job.layout.coordinates(rank)["pp"]))
    layers = sum(stage.layers for stage in stages)
    calls = layers * (4 + 2 * (job.recompute == "full"))
    if job.model.qk_norm == "full":
        calls += layers * (2 if job.recompute == "none" else 3)
    calls += 2 * sum(stage.embedding + stage.head for stage in stages)
    rounds = job.microbatches
    return seconds + calls * rounds * gpu.latency(1, job.tp)


def _pipeline_links(job: Job, gpu: Gpu, sent: Sent, rank: int) -> float:
    if job.pp == 1:
        return 0.0
    stride = job.tp * job.dp * job.replica
    pp_rank = job.layout.coordinates(rank)["pp"]
    messages = sum(job.plan.sends_per_step(pp_rank, job.microbatches))
    seconds = _bytes_on(sent, "pp") / gpu.link_bandwidth(stride, job.pp)
    return seconds + messages * gpu.latency(stride, job.pp)


def _reduction(job: Job, gpu: Gpu, sent: Sent, rank: int, last_backward: float) -> float:
    seconds = 0.0
    if job.dp > 1:
        waits = job.plan.splits_backward or _sizes(job, rank).completes_gradients
        seconds = sent["dp", "reduce_scatter"] / gpu.link_bandwidth(job.tp, job.dp)
        if not waits:
            seconds = max(0.0, seconds - last_backward)
    if job.replica > 1:  # after it; nothing where each replica has its own objective
        seconds += sent["replica", "all_reduce"] / _between_replicas(job, gpu)
    return seconds


def _update_links(job: Job, gpu: Gpu, rank: int) -> float:
    """What replicas tell each other, and the gather of the new weights."""
    sent = update_bytes(job.model, job.layout, job.plan, job.step_shape, rank)
    seconds = 0.0
    if job.dp > 1:
        seconds += sent["dp", "all_gather"] / gpu.link_bandwidth(job.tp, job.dp)
    if job.in_replicas:
        between = sent["replica", "all_reduce"] + sent["replica", "all_gather"]
        seconds += between / _between_replicas(job, gpu)
    return seconds


def _between_replicas(job: Job, gpu: Gpu) -> float:
    return gpu.link_bandwidth(job.tp * job.dp, job.replica)


def _optimizer(job: Job, gpu: Gpu, rank: int) -> float:
    """One pass: master read and written, of each objective a gradient read and moments read and
    written, the new weights; before it the norms, and the gradient buffer's zeros."""
    n, held, updates = Widths.of(job), _sizes(job, rank).parameters, job.updates_per_step
    shard = held / job.dp
    update = shard * (2 * n.w + 5 * n.w * updates + n.e)
    norms = shard * n.w * updates
    # An update that is sent is written and packed, and what comes back is added.
    exchange = shard * 6 * n.w * job.averages_per_step if job.in_replicas else 0.0
    return gpu.pass_seconds(update + norms + held * n.w * updates + exchange)


def _sizes(job: Job, rank: int) -> Sizes:
    return job.sizes(job.layout.coordinates(rank)["pp"])


def _bytes_on(sent: Sent, axis: str) -> int:
    return sum(count for (on, _), count in sent.items() if on == axis)
