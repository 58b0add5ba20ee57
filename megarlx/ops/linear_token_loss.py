"""The token loss from hidden states and the head weight, a chunk of rows at a time.

The logits of a chunk, `hidden @ weight.T` in fp32, are overwritten by their own gradient, which
gives the chunk's part of both gradients: three products, and never more than a chunk of logits.
The formulas are token_loss's. Letters: T tokens, d hidden size, V vocabulary (this rank's slice).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megarlx.comm.collectives import all_reduce_
from megarlx.ops.loss_spec import LossSpec, TokenLoss, refuse
from megarlx.ops.token_inputs import (
    TokenInputs,
    check_floats,
    check_vocab_size,
    precision_of,
    prepare,
)
from megarlx.ops.token_loss import (
    combine_partials_,
    empty_results,
    scaled,
    shaped,
)

if TYPE_CHECKING:
    from megarlx.comm.groups import Group

FIELDS = 8  # of math/token_loss.h
# A chunk of logits is written by one product and read by two more: at this many rows the products
# are at full rate, and what a chunk costs besides (reading and writing the whole weight gradient)
# is small beside them.
CPU_ROWS, CUDA_ROWS = (256, 4096), (256, 4096)  # at least, at most
CPU_LOGITS, CUDA_LOGITS = 1 << 22, 1 << 29  # of a chunk: 16 MiB (half a cache), 2 GiB


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    spec: LossSpec,
    *,
    normalizer: Tensor | float,
    mask: Tensor | None = None,
    advantages: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    token_weights: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    group: Group | None = None,
    vocab_size: int | None = None,
    weight_grad_: Tensor | None = None,
    reduce_hidden_grad: bool = True,
    drop_masked: bool = True,
    rows_per_chunk: int | None = None,
) -> TokenLoss:
    """token_loss of the logits `hidden` [..., d] @ `weight` [V, d].T, which never exist whole.

    group               `weight` is this rank's slice of the vocabulary; targets are global ids
    reduce_hidden_grad  sums the gradient of `hidden` over the group. False leaves each rank its
                        part: for a hidden state that came through gather_sequence or
                        copy_to_group, whose backward does the sum
    weight_grad_        an fp32 (fp64) [V, d] buffer to which the gradient of `weight` is added in
                        this very call; autograd then gives `weight` none. Only for a loss whose
                        upstream gradient is 1, and whose backward is sure to follow
    drop_masked         masked rows are left out of the products. On a GPU their number has to be
                        waited for: False computes them and does not wait
    rows_per_chunk      rows of logits that exist at one time
    """
    op = "linear_token_loss"
    check_floats(op, "hidden", hidden, 1)
    check_floats(op, "weight", weight, 2)
    size = 1 if group is None else group.size
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        refuse(op, "weight's shape", tuple(weight.shape), f"[V, {hidden.shape[-1]}]")
    if weight.dtype != hidden.dtype:
        refuse(op, "weight's dtype", weight.dtype, f"{hidden.dtype}, hidden's")
    if weight.device != hidden.device:
        refuse(op, "weight's device", weight.device, f"{hidden.device}, hidden's")
    if weight.shape[0] == 0:
        refuse(op, "weight's shape", tuple(weight.shape), "a vocabulary of at least 1")
    vocab_size = check_vocab_size(op, vocab_size, weight.shape[0] * size)
    tokens = prepare(
        op,
        spec,
        hidden,
        hidden.shape[:-1],
        targets=targets,
        mask=mask,
        advantages=advantages,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        token_weights=token_weights,
        normalizer=normalizer,
        temperature=temperature,
    )
    if rows_per_chunk is None:
        rows_per_chunk = default_rows(hidden, weight)
    if not isinstance(rows_per_chunk, int | torch.SymInt) or rows_per_chunk < 1:
        refuse(op, "rows_per_chunk", rows_per_chunk, "an integer >= 1")
    rows = hidden if hidden.dim() == 2 else hidden.reshape(-1, hidden.shape[-1])
    needs_gradient = hidden.requires_grad or weight.requires_grad or weight_grad_ is not None
    with_gradient = torch.is_grad_enabled() and needs_gradient
    if weight_grad_ is not None:
        check_weight_grad(op, weight, weight_grad_)
    whole = group is None or size == 1
    if whole and (weight_grad_ is None or not with_gradient):
        result = torch.ops.megarlx.linear_token_loss(
            rows,
            weight,
            *tokens.arguments,
            vocab_size,
            *spec.arguments,
            rows_per_chunk,
            drop_masked,
            with_gradient,
        )[:4]
    else:
        result = _LinearTokenLoss.apply(
            rows,
            weight,
            tokens,
            spec,
            vocab_size,
            rows_per_chunk,
            drop_masked,
            with_gradient,
            None if whole else group,
            weight_grad_,
            reduce_hidden_grad,
        )
    return shaped(result, targets.shape)


def default_rows(hidden: Tensor, weight: Tensor) -> int:
    return rows_for(weight.shape[0], on_cuda=hidden.device.type == "cuda")


def rows_for(vocabulary: int, *, on_cuda: bool) -> int:
    """Rows of a chunk of logits where nothing else is said; `vocabulary` is this rank's."""
    least, most = CUDA_ROWS if on_cuda else CPU_ROWS
    logits = CUDA_LOGITS if on_cuda else CPU_LOGITS
    return max(least, min(most, logits // vocabulary))


def check_weight_grad(op: str, weight: Tensor, weight_grad_: Tensor) -> None:
    if not isinstance(weight_grad_, Tensor):
        refuse(op, "weight_grad_", f"a {type(weight_grad_).__name__}", "a tensor")
    expected = (weight.shape, precision_of(weight.dtype), weight.device, True)
    given = (
        weight_grad_.shape,
        weight_grad_.dtype,
        weight_grad_.device,
        weight_grad_.is_contiguous(),
    )
    if given != expected:
        names = ("shape", "dtype", "device", "contiguous")
        for name, value, allowed in zip(names, given, expected, strict=True):
            if value != allowed:
                refuse(op, f"weight_grad_'s {name}", value, str(allowed))


def sharded_chunks(
    hidden: Tensor,
    weight: Tensor,
    tokens: TokenInputs,
    spec: LossSpec,
    vocab_size: int,
    rows_per_chunk: int,
    drop_masked: bool,
    group: Group,
    grad_weight: Tensor | None,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """((loss, log-probs, entropy, metrics), this rank's part of grad_hidden).

    The chunk loop of csrc/linear_token_loss.cpp with two collectives in each chunk, which make the
    partial sums of the shards whole. The weight's gradient is added to `grad_weight`; without one
    there are no gradients.
    """
    total = hidden.shape[0]
    kept: Tensor | None = None
    if tokens.mask is not None and drop_masked:
        kept = tokens.mask.nonzero()[:, 0]
        hidden, tokens = hidden.index_select(0, kept), tokens.select(kept)
    count, vocabulary = hidden.shape[0], weight.shape[0]
    precision = precision_of(hidden.dtype)
    narrow = hidden.dtype != precision
    mixed = narrow and hidden.device.type == "cuda"
    if narrow and not mixed:
        weight = weight.to(precision)
    rows = min(rows_per_chunk, max(count, 1))
    buffer = torch.empty(rows, vocabulary, dtype=precision, device=hidden.device)
    gradient_buffer = torch.empty_like(buffer, dtype=hidden.dtype) if mixed else buffer
    _, logprobs, entropy, _ = empty_results(hidden, count)
    fields = logprobs.new_empty(count, FIELDS)
    grad_hidden = torch.empty_like(hidden)
    vocab_start = group.rank * vocabulary
    ops = torch.ops.megarlx

    for begin in range(0, count, rows):
        end = min(begin + rows, count)
        logits, in_chunk = buffer[: end - begin], tokens.rows(begin, end)
        chunk_hidden = hidden[begin:end]
        if mixed:
            torch.mm(chunk_hidden, weight.t(), out_dtype=precision, out=logits)
        else:
            chunk_hidden = chunk_hidden.to(precision)
            torch.mm(chunk_hidden, weight.t(), out=logits)
        partials = ops.token_loss_partials(
            logits, in_chunk.targets, in_chunk.mask, tokens.temperature, vocab_start, vocab_size
        )
        combine_partials_(partials, group)
        gradient = None if grad_weight is None else gradient_buffer[: end - begin]
        ops._token_loss_rows_(
            logits,
            partials,
            *in_chunk.arguments,
            vocab_start,
            vocab_size,
            *spec.arguments,
            gradient,
            logprobs[begin:end],
            entropy[begin:end],
            fields[begin:end],
        )
        if gradient is None or grad_weight is None:
            continue
        grad_hidden[begin:end] = torch.mm(gradient, weight)
        if mixed:
            torch.addmm(
                grad_weight, gradient.t(), chunk_hidden, out_dtype=precision, out=grad_weight
            )
        else:
            grad_weight.addmm_(gradient.t(), chunk_hidden)

    loss, metrics = ops._token_loss_sums(fields)
    if kept is not None:
        logprobs = logprobs.new_zeros(total).index_copy_(0, kept, logprobs)
        entropy = entropy.new_zeros(total).index_copy_(0, kept, entropy)
        spread = grad_hidden.new_zeros(total, hidden.shape[1])
        grad_hidden = spread.index_copy_(0, kept, grad_hidden)
    return (loss, logprobs, entropy, metrics), grad_hidden


class _LinearTokenLoss(torch.autograd.Function):
    """Over vocabulary shards, and with a weight gradient that is added to a buffer."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        tokens: TokenInputs,
        spec: LossSpec,
        vocab_size: int,
        rows_per_chunk: int,
        drop_masked: bool,
        with_gradient: bool,
        group: Group | None,
        weight_grad_: Tensor | None,
        reduce_hidden_grad: bool,
    ) -> tuple[Tensor, ...]:
        ctx.accumulated = weight_grad_ is not None
        ctx.weight_dtype = weight.dtype
        if group is None:
            *result, grad_hidden = torch.ops.megarlx._linear_token_loss_(
                hidden,
                weight,
                *tokens.arguments,
                vocab_size,
                *spec.arguments,
                rows_per_chunk,
                drop_masked,
                weight_grad_,
            )
        else:
            if with_gradient and weight_grad_ is None:
                weight_grad_ = torch.zeros_like(weight, dtype=precision_of(weight.dtype))
            shared, grad_hidden = sharded_chunks(
                hidden,
                weight,
                tokens,
                spec,
                vocab_size,
                rows_per_chunk,
                drop_masked,
                group,
                weight_grad_ if with_gradient else None,
            )
            result = list(shared)
            if with_gradient and reduce_hidden_grad:
                all_reduce_(grad_hidden, group)
        if with_gradient:
            saved = (grad_hidden,) if ctx.accumulated else (grad_hidden, weight_grad_)
            ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(*result[1:])
        return tuple(result)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.accumulated and upstream.device.type == "cpu" and upstream.item() != 1:
            refuse(
                "linear_token_loss",
                "the upstream gradient",
                upstream.item(),
                "1 where weight_grad_ is given: the weight's gradient was added without it",
            )
        grad_hidden, *of_weight = (scaled(gradient, upstream) for gradient in ctx.saved_tensors)
        grad_weight = of_weight[0].to(ctx.weight_dtype) if of_weight else None
        return (grad_hidden, grad_weight, *[None] * 9)


@torch.library.register_fake("megarlx::linear_token_loss")
def _linear_token_loss_fake(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    with_gradient = arguments[-1]
    gradients = [x.new_empty(x.shape if with_gradient else 0) for x in (hidden, weight)]
    return (*empty_results(hidden, hidden.shape[0]), *gradients)


@torch.library.register_fake("megarlx::_linear_token_loss_")
def _linear_token_loss_accumulate_fake(hidden: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return (*empty_results(hidden, hidden.shape[0]), hidden.new_empty(hidden.shape))
