"""Bytes of memory on each rank, by kind.

    weights          the model's, in the type it computes in, and their copies in fp8 where
                     rollouts decode with those
    gradients        the flat buffer that every objective's backward fills in turn
    optimizer        masters, of each objective a gradient shard and what its update rule keeps;
                     local masters, what is combined, outer momentum, frozen references, masks of
                     protected weights and a moving average of the weights where a stage has them
    activations      of the micro-batches in flight, as the recomputation leaves them
    workspace        what the loss, or the backward of a layer, needs on top at the worst moment
    batch            the step's token ids and masks
    kv_cache         keys and values of the rollouts, where there are any

The sum is the peak of a step. What an allocator loses between blocks, CUDA's own context and the
buffers of NCCL are not in it: `hardware` has a reserve for them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from megarlx.choices import PAGE_TOKENS
from megarlx.model.kv_cache import pages_of_slots, shares_prompts
from megarlx.parallel.pipeline_actions import computations, most_held
from megarlx.planning.activations import (
    Widths,
    layer_backward_workspace,
    layer_delayed,
    loss_workspace,
    stage_kept,
)
from megarlx.planning.job import Job
from megarlx.planning.pieces import Rollouts

BYTES_OF_A_TOKEN = 8 + 8 + 8 + 1  # id, target, position, mask


@dataclass(frozen=True)
class Memory:
    """Of one rank, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    batch: int
    kv_cache: int

    @property
    def persistent(self) -> int:
        """There from the first step to the last."""
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        return self.persistent + self.activations + self.workspace + self.batch + self.kv_cache

    def by_kind(self) -> dict[str, int]:
        return asdict(self)


def rank_memory(job: Job, rank: int, rollouts: Rollouts | None = None) -> Memory:
    """What a global rank needs: objectives follow each other, so what a step adds is the most that
    one of them does. `rollouts` are held besides those of the objectives."""
    pp_rank = job.layout.coordinates(rank)["pp"]
    numbers = job.sizes(pp_rank).flat
    n = Widths.of(job)
    trained = job.trained_on(rank)
    added = max((_of_step(one, pp_rank) for one in trained), key=sum)
    makers = job.all_objectives if job.generates_together else trained
    engines = [one.rollouts for one in makers if one.rollouts is not None]
    engines += [] if rollouts is None else [rollouts]
    layers = sum(stage.layers for stage in job.stages(pp_rank))
    copies = sum(engine.fp8 for engine in engines) * layers * layer_in_fp8(n)
    return Memory(
        weights=numbers * n.e + copies,
        gradients=numbers * n.w,
        optimizer=optimizer_bytes(trained[0], numbers),
        activations=added[0],
        workspace=added[1],
        batch=added[2],
        kv_cache=sum(kv_cache_bytes(job, pp_rank, engine) for engine in engines),
    )


def _of_step(job: Job, pp_rank: int) -> tuple[int, int, int]:
    """Activations, workspace and batch of one objective."""
    n = Widths.of(job)
    stages = list(job.stages(pp_rank))
    backward = layer_backward_workspace(job, n) if any(s.layers for s in stages) else 0
    loss = loss_workspace(job, n) if any(s.head for s in stages) else 0
    return (
        activations(job, n, pp_rank),
        max(backward, loss),
        job.tokens_per_microbatch * job.microbatches * BYTES_OF_A_TOKEN,
    )


def activations(job: Job, n: Widths, pp_rank: int) -> int:
    """Of the micro-batches in flight, when they are the most of a step."""
    stages = {stage.index: stage for stage in job.stages(pp_rank)}
    kept = {index: stage_kept(job, n, stage) for index, stage in stages.items()}
    delayed = {index: stage.layers * layer_delayed(n) for index, stage in stages.items()}
    # Layer by layer the one gives way to the other; the last layer's own are in the workspace.
    within = {
        index: max(
            kept[index], kept[index] + (delayed[index] - kept[index]) * (layers - 1) // layers
        )
        for index, stage in stages.items()
        for layers in [max(1, stage.layers)]
    }
    microbatches = job.microbatches if job.pp > 1 else 1
    return most_held(computations(job.plan, pp_rank, microbatches), kept, within, delayed)


def optimizer_bytes(job: Job, numbers: int) -> int:
    """Of a rank that holds `numbers`, buffer padding included: `Optimizer`'s tensors."""
    shard, w, held = numbers // job.dp, job.wide_bytes, job.kept
    masters_are_weights = job.dp == 1 and job.element_bytes == w and not held.locals
    gradients_are_buffer = job.dp == 1 and held.gradients == 1
    wide = held.states + held.locals + held.exchange + held.outer + held.average
    wide += 0 if gradients_are_buffer else held.gradients
    wide += 0 if masters_are_weights else 1
    total = shard * (wide * w + held.frozen * job.element_bytes + held.masks)
    if job.dp > 1 and job.element_bytes != w:
        total += shard * job.element_bytes  # updated weights on their way to everybody
    return total


def layer_in_fp8(n: Widths) -> int:
    """`Fp8Products`' bytes: one for each number of a matrix, an fp32 scale for each output."""
    products = ((n.q + 2 * n.k, n.h), (n.h, n.q), (2 * n.F, n.h), (n.h, n.F))
    return sum(outputs * (columns + 4) for outputs, columns in products)


def kv_cache_bytes(job: Job, pp_rank: int, rollouts: Rollouts) -> int:
    """`Engine`'s caches: pages for its slots, and an idle one."""
    slots = -(-rollouts.slots // job.pp) * job.pp
    size = PAGE_TOKENS["cuda" if job.on_gpu else "cpu"]
    if rollouts.cache_tokens is None:
        shares = shares_prompts(rollouts.slots, not job.on_gpu)
        pages = pages_of_slots(slots, rollouts.longest, size=size, shares=shares)
    else:
        pages = -(-rollouts.cache_tokens // size)
    layers = sum(stage.layers for stage in job.stages(pp_rank))
    kv = job.model.local_kv_heads(job.tp) * job.model.head_dim
    return 2 * layers * (1 + pages) * size * kv * job.element_bytes


def worst_rank(job: Job, rollouts: Rollouts | None = None) -> tuple[int, Memory]:
    """The rank with the highest peak. Ranks differ by their place in the pipeline, by the objective
    of their replica, and of those that hold the same shapes the first has the most micro-batches in
    flight."""
    memories = {rank: rank_memory(job, rank, rollouts) for rank in job.different_ranks()}
    worst = max(memories, key=lambda rank: memories[rank].peak)
    return worst, memories[worst]
