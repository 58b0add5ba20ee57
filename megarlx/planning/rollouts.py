"""A roofline of generation on the training layout: `slots` sequences at once on each copy.

Modelled: reading weights and the KV cache or the arithmetic of the products, whichever is longer,
what each kernel of a step takes however little it reads, tensor-parallel sums, reading the logits
once, prefill at the products' rate, every slot's prompt computed by itself (a group that shares its
prompt is cheaper). Under a pipeline the slots form as many groups as there are ranks, which follow
each other. Not modelled: slots that idle while the longest sequence ends, reward functions.

Letters as in activations.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megarlx.comm.hardware import DECODE_KERNEL, DECODE_KERNELS_OF_LAYER, Gpu
from megarlx.planning.activations import Widths
from megarlx.planning.job import Job
from megarlx.planning.pieces import Rollouts


@dataclass(frozen=True)
class RolloutTime:
    """Of filling all slots of all copies once, to the last token of a completion."""

    prefill_seconds: float
    decode_seconds: float
    token_seconds: float  # one more token for every slot
    tokens: int  # of the completions, over all copies
    mfu: float

    @property
    def total(self) -> float:
        return self.prefill_seconds + self.decode_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.total


def rollout_time(job: Job, gpu: Gpu, rollouts: Rollouts) -> RolloutTime:
    rows = -(-rollouts.slots // job.pp)
    mean_context = rollouts.prompt_tokens + rollouts.completion_tokens / 2
    slowest = max(_stage_token(job, gpu, pp, rows, mean_context) for pp in job.kinds())
    token = job.pp * slowest
    prefill = _prefill(job, gpu, rollouts)
    decode = token * rollouts.completion_tokens
    copies = job.dp * job.replica
    tokens = rollouts.slots * copies * rollouts.completion_tokens
    prompts = rollouts.slots * copies * rollouts.prompt_tokens
    # Forward is a third of what a training token costs.
    written = rollouts.prompt_tokens + rollouts.completion_tokens
    each = job.model.flops_per_token(written) / 3
    share = (tokens + prompts) * each / ((prefill + decode) * job.gpus * gpu.flops)
    return RolloutTime(prefill, decode, token, tokens, share)


def _stage_token(job: Job, gpu: Gpu, pp_rank: int, rows: int, context: float) -> float:
    """One token of `rows` sequences through the stages of a rank."""
    n, stages = Widths.of(job), list(job.stages(pp_rank))
    layers = sum(stage.layers for stage in stages)
    shapes = ((n.h, n.q + 2 * n.k), (n.q, n.h), (n.h, 2 * n.F), (n.F, n.h))
    kind = job.arithmetic
    seconds = layers * sum(gpu.product_seconds(rows, a, b, n.e, kind) for a, b in shapes)
    seconds += layers * gpu.cache_seconds(rows * context * 2 * n.k * n.e)
    seconds += layers * DECODE_KERNELS_OF_LAYER * DECODE_KERNEL
    sums = 2 * layers
    if any(stage.head for stage in stages):
        seconds += gpu.product_seconds(rows, n.h, n.V, n.e, kind)
        seconds += gpu.pass_seconds(rows * n.V * n.w)
        sums += 1
    return seconds + _sums(job, gpu, rows, sums)


def _sums(job: Job, gpu: Gpu, rows: int, count: int) -> float:
    if job.tp == 1:
        return 0.0
    n = Widths.of(job)
    sent = 2 * (job.tp - 1) / job.tp * rows * n.h * n.e
    return count * (sent / gpu.link_bandwidth(1, job.tp) + gpu.latency(1, job.tp))


def _prefill(job: Job, gpu: Gpu, rollouts: Rollouts) -> float:
    """All prompts of a copy; its pipeline ranks work on different prompts at the same time."""
    n = Widths.of(job)
    tokens = rollouts.slots * rollouts.prompt_tokens
    shapes = ((n.h, n.q + 2 * n.k), (n.q, n.h), (n.h, 2 * n.F), (n.F, n.h))
    kind = job.arithmetic
    layer = sum(gpu.product_seconds(tokens, a, b, n.e, kind) for a, b in shapes)
    layer += gpu.attention_seconds(
        4 * n.q * tokens * job.model.keys_seen(rollouts.prompt_tokens), kind
    )
    layers = max(sum(s.layers for s in job.stages(pp)) for pp in job.kinds())
    return layers * layer + _sums(job, gpu, tokens, 2 * layers)


def generation_seconds(job: Job, gpu: Gpu) -> float:
    """What the samples of a step take where all are of the longest: the slots are filled again
    until all are there. Log-probs of samples and their rewards are not modelled."""
    total = 0.0
    for one in job.all_objectives:
        if one.rollouts is None:
            continue
        copies = job.dp * (job.replica if job.generates_together else one.trainers // job.dp)
        each = -(-one.samples_per_step // copies)
        rounds, left = divmod(each, one.rollouts.slots)
        seconds = rounds * rollout_time(job, gpu, one.rollouts).total
        if left:
            seconds += rollout_time(job, gpu, replace(one.rollouts, slots=left)).total
        total += seconds * one.share_of_steps
    return total
