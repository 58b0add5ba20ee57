"""Bytes that one micro-batch keeps between forward and backward, and what backward needs besides.

What autograd keeps is a property of the code: each term below is a tensor that some op of
megarlx/model saves, so a change there is a change here. `benchmarks/memory.py` measures both.

Letters: T tokens of a micro-batch, t those a rank holds between tensor-parallel parts, h hidden
size, q and k the widths of this rank's query and key projection, F its width inside the MLP, V its
rows of the vocabulary, e and w bytes of an activation and of a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

from megarlx.config.families import ON_NO_DEVICE
from megarlx.config.model import ModelConfig
from megarlx.model.features import features_of
from megarlx.planning.job import Job
from megarlx.planning.pieces import StagePart

FIELDS_OF_A_TOKEN = 8  # of the loss's table, beside log-prob and entropy


@dataclass(frozen=True)
class Widths:
    """The numbers of the legend, on one rank."""

    T: int
    t: int
    h: int
    q: int
    k: int
    F: int
    V: int
    heads: int
    kv_heads: int
    e: int
    w: int

    @staticmethod
    def of(job: Job) -> Widths:
        model = job.model
        check_known(model)
        heads, kv_heads = model.heads // job.tp, model.local_kv_heads(job.tp)
        return Widths(
            T=job.tokens_per_microbatch,
            t=job.tokens_between,
            h=model.hidden_size,
            q=heads * model.head_dim,
            k=kv_heads * model.head_dim,
            F=model.intermediate_size // job.tp,
            V=job.local_vocabulary,
            heads=heads,
            kv_heads=kv_heads,
            e=job.element_bytes,
            w=job.wide_bytes,
        )


def check_known(model: ModelConfig) -> None:
    """Refuses layers that compute, and so may keep, something else than what is counted here."""
    unknown = features_of(model) - ON_NO_DEVICE
    if unknown:
        raise ValueError(
            f"plan: the layers are built with {', '.join(sorted(unknown))}; what that keeps and "
            "costs is not known"
        )


def _attention_core(job: Job, n: Widths) -> int:
    """From the fused projection to the attended values, those not counted: what selective
    recomputation computes again."""
    kept = n.T * (n.q + n.k) * n.e  # queries and keys, normalised and rotated
    if not job.model.needs_of_attention:
        kept += n.T * n.heads * n.w  # log-sum-exp; by blocks of queries it is made again
    if job.model.qk_norm == "full" and job.tp > 1:
        copies = 2 if n.e != n.w else 1  # in fp32 the wide projection is the projection
        kept += copies * n.T * (n.q + n.k) * n.w
    elif job.model.qk_norm == "full":
        kept += 2 * n.T * n.w
    elif job.model.qk_norm == "per_head":
        kept += n.T * (n.heads + n.kv_heads) * n.w
    return kept


def layer_whole(job: Job, n: Widths) -> int:
    """A layer that keeps everything."""
    entering = n.T * n.h * n.e  # what a column-parallel product multiplies
    normed = n.t * (n.h * n.e + n.w)  # a norm's input and its inverse
    norms = 4 if job.model.norm_position == "both" else 2
    kept = 2 * entering + norms * normed
    kept += n.T * (n.q + 2 * n.k) * n.e  # the fused projection; values stay in it
    kept += _attention_core(job, n)
    kept += n.T * n.q * n.e  # attended values, which the output projection multiplies
    kept += n.T * 3 * n.F * n.e  # gate and up, and their product
    return kept


def layer_kept(job: Job, n: Widths) -> int:
    """A layer between its forward and its backward, under the job's recomputation."""
    if job.recompute == "full":
        return n.t * n.h * n.e
    whole = layer_whole(job, n)
    if job.recompute == "selective":
        whole -= _attention_core(job, n) + n.T * n.F * n.e  # the product of gate and up
    return whole


def stage_kept(job: Job, n: Widths, stage: StagePart) -> int:
    """A stage between forward and backward of one micro-batch, without the loss."""
    kept = stage.layers * layer_kept(job, n)
    kept += n.T * job.model.head_dim * n.e  # cos and sin of every position
    hidden = n.t * n.h * n.e
    post = job.model.norm_position != "pre"
    if stage.head:
        kept += hidden + n.t * n.w  # the final norm's input and inverse
    elif job.pp > 1:
        kept += hidden  # what was sent, to go backward from
    if job.pp > 1 and not stage.embedding and post and job.splits_sequence:
        kept += hidden  # what was received: no layer keeps it, the schedule does
    if stage.embedding and job.tp > 1:
        kept += n.T * 10  # the ids within the shard, and which lie outside it
    return kept


def layer_delayed(n: Widths) -> int:
    """Where backward is split, a layer from its input's gradient to those of its weights: of each
    product its input and its output's gradient."""
    attention = n.h + (n.q + 2 * n.k) + n.q + n.h
    mlp = n.h + 2 * n.F + n.F + n.h
    return n.T * (attention + mlp) * n.e


def loss_workspace(job: Job, n: Widths) -> int:
    """At the end of the last stage's forward: normed states, chunks of logits, both gradients."""
    logits = _logits(job, n)
    hidden = n.T * n.h * n.e
    weight_gradient = n.V * n.h * n.w
    widened = 0
    if n.e != n.w and not job.on_gpu:
        widened = weight_gradient  # the weight itself, for products that a CPU has
        widened += n.T * n.h * n.w if job.keeps_gradients else 0  # and all hidden rows
    table = n.T * (2 + FIELDS_OF_A_TOKEN) * n.w
    in_loss = logits + widened + weight_gradient
    if n.e != n.w and job.tp == 1:
        in_loss = max(in_loss, weight_gradient + n.V * n.h * n.e)  # narrowed at the end
    gathered = hidden if job.splits_sequence else 0
    return (n.t * n.h * n.e) + gathered + in_loss + hidden + table


def _logits(job: Job, n: Widths) -> int:
    """A chunk of the loss's logits and the gradients by them, of a chunk or all."""
    chunk = job.loss_rows * n.V
    gradients = n.T * n.V if job.keeps_gradients else chunk
    slope = chunk * n.w if job.model.final_cap else 0
    if n.e != n.w and job.on_gpu:  # the products read a narrow copy of the logits' gradient
        return chunk * n.w + gradients * n.e + slope
    return gradients * n.w + slope  # each gradient in the place of its logits


def layer_backward_workspace(job: Job, n: Widths) -> int:
    """The most that the backward of one layer has beside what was kept, less what it has freed."""
    hidden, gathered = n.t * n.h * n.e, n.T * n.h * n.e

    def of_weight(numbers: int) -> int:
        """A product's gradient of its weight, before it is added to the buffer."""
        return numbers * (n.e if n.e == n.w else n.e + n.w)

    inner = n.T * n.F * n.e
    # The product of gate and up is freed behind the down projection, or was made again for it.
    again = inner if job.recompute == "selective" else 0
    post = job.model.norm_position != "pre"
    # Backward of the down projection, of SwiGLU, and of gate and up, in that order. The gradient
    # of the residual stream is there all along, and the upper norm's is its own.
    coming = hidden + (gathered if post or job.splits_sequence else 0)
    if job.plan.splits_backward:
        # The products' inputs and their outputs' gradients stay, and no weight has one yet.
        points = [coming + inner + again, hidden + gathered + 3 * inner + again]
    else:
        points = [
            coming + inner + again + of_weight(n.h * n.F),
            hidden + 3 * inner - (inner - again),
            hidden + 2 * inner + gathered + of_weight(2 * n.F * n.h) - (3 * inner - again),
        ]
    if job.recompute == "full":
        # Everything of the layer is there again, its output included.
        return layer_whole(job, n) + max(points)
    return max(points)
