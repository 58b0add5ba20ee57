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
CPU_LOGITS, CUDA_LOGITS = 1 << 21, 1 << 29  # of a chunk: 8 MiB (a CPU's cache), 2 GiB


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
    rows = hidden.reshape(-1, hidden.shape[-1])
    needs_gradient = hidden.requires_grad or weight.requires_grad or weight_grad_ is not None
    with_gradient = torch.is_grad_enabled() and needs_gradient
    if weight_grad_ is not None:
        check_weight_grad(op, weight, weight_grad_)
    whole = group is None or size == 1
    if whole and weight_grad_ is None and drop_masked:
        result = torch.ops.megarlx.linear_token_loss(
            rows,
            weight,
            *tokens.arguments,
            vocab_size,
            *spec.arguments,
            rows_per_chunk,
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
            with_gradient,
            None if whole else group,
            weight_grad_,
            reduce_hidden_grad,
            drop_masked,
        )
    return shaped(result, targets.shape)


def default_rows(hidden: Tensor, weight: Tensor) -> int:
    on_cuda = hidden.device.type == "cuda"
    least, most = CUDA_ROWS if on_cuda else CPU_ROWS
    logits = CUDA_LOGITS if on_cuda else CPU_LOGITS
    return max(least, min(most, logits // weight.shape[0]))


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


def chunk_loop(
    hidden: Tensor,
    weight: Tensor,
    tokens: TokenInputs,
    spec: LossSpec,
    vocab_size: int,
    rows_per_chunk: int,
    with_gradient: bool,
    group: Group | None = None,
    weight_grad_: Tensor | None = None,
    drop_masked: bool = True,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor, Tensor]:
    """((loss, log-probs, entropy, metrics), grad_hidden, grad_weight); no gradient: both empty.

    The gradient of the weight is in fp32 (fp64), and is `weight_grad_` where that was given.
    """
    total = hidden.shape[0]
    kept: Tensor | None = None
    if tokens.mask is not None and drop_masked:
        kept = tokens.mask.nonzero()[:, 0]
        if kept.shape[0] == total:
            kept = None
        else:
            hidden = hidden.index_select(0, kept)
            tokens = tokens.select(kept)

    count, vocabulary = hidden.shape[0], weight.shape[0]
    precision = precision_of(hidden.dtype)
    narrow = hidden.dtype != precision
    on_cuda = hidden.device.type == "cuda"
    if narrow and not on_cuda:
        weight = weight.to(precision)  # a CPU has no mixed product worth having
    rows = min(rows_per_chunk, max(count, 1))
    buffer = torch.empty(rows, vocabulary, dtype=precision, device=hidden.device)
    gradient = None
    if with_gradient:
        gradient = buffer
        if narrow and on_cuda:
            gradient = torch.empty_like(buffer, dtype=hidden.dtype)
    _, logprobs, entropy, _ = empty_results(hidden, count)
    fields = torch.empty(count, FIELDS, dtype=precision, device=hidden.device)
    vocab_start = 0 if group is None else group.rank * vocabulary

    grad_hidden = hidden.new_empty(hidden.shape if with_gradient else 0)
    first = weight_grad_ is None
    if not with_gradient:
        weight_grad_ = weight.new_empty(0, dtype=precision)
    elif weight_grad_ is None:
        make = torch.empty if count else torch.zeros
        weight_grad_ = make(weight.shape, dtype=precision, device=weight.device)
    transposed = weight.t()
    for begin in range(0, count, rows):
        end = min(begin + rows, count)
        chunk_hidden = hidden[begin:end]
        chunk_tokens = tokens.rows(begin, end) if rows < count else tokens
        logits = buffer[: end - begin]
        chunk_gradient = None if gradient is None else gradient[: end - begin]
        if narrow and on_cuda:
            torch.mm(chunk_hidden, transposed, out_dtype=precision, out=logits)
        else:
            chunk_hidden = chunk_hidden.to(precision)
            torch.mm(chunk_hidden, transposed, out=logits)
        partials = None
        if group is not None:
            partials = torch.ops.megarlx.token_loss_partials(
                logits,
                chunk_tokens.targets,
                chunk_tokens.mask,
                tokens.temperature,
                vocab_start,
                vocab_size,
            )
            combine_partials_(partials, group)
        torch.ops.megarlx._token_loss_rows_(
            logits,
            partials,
            *chunk_tokens.arguments,
            vocab_start,
            vocab_size,
            *spec.arguments,
            chunk_gradient,
            logprobs[begin:end],
            entropy[begin:end],
            fields[begin:end],
        )
        if chunk_gradient is None:
            continue
        if narrow and not on_cuda:
            grad_hidden[begin:end] = torch.mm(chunk_gradient, weight)
        else:
            torch.mm(chunk_gradient, weight, out=grad_hidden[begin:end])
        add_product_(weight_grad_, chunk_gradient, chunk_hidden, replace=first)
        first = False

    loss, metrics = torch.ops.megarlx._token_loss_sums(fields)
    if kept is not None:
        logprobs = logprobs.new_zeros(total).index_copy_(0, kept, logprobs)
        entropy = entropy.new_zeros(total).index_copy_(0, kept, entropy)
        if with_gradient:
            spread = grad_hidden.new_zeros(total, grad_hidden.shape[1])
            grad_hidden = spread.index_copy_(0, kept, grad_hidden)
    return (loss, logprobs, entropy, metrics), grad_hidden, weight_grad_


def add_product_(total: Tensor, gradient: Tensor, hidden: Tensor, *, replace: bool) -> None:
    """total [V, d] += gradient [rows, V].T @ hidden [rows, d], or = where `replace`."""
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.t(), hidden, beta=0 if replace else 1)
    elif replace:
        torch.mm(gradient.t(), hidden, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, gradient.t(), hidden, out_dtype=total.dtype, out=total)


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
        with_gradient: bool,
        group: Group | None,
        weight_grad_: Tensor | None,
        reduce_hidden_grad: bool,
        drop_masked: bool,
    ) -> tuple[Tensor, ...]:
        result, grad_hidden, grad_weight = chunk_loop(
            hidden,
            weight,
            tokens,
            spec,
            vocab_size,
            rows_per_chunk,
            with_gradient,
            group,
            weight_grad_,
            drop_masked,
        )
        if group is not None and with_gradient and reduce_hidden_grad:
            all_reduce_(grad_hidden, group)
        ctx.accumulated = weight_grad_ is not None
        ctx.weight_dtype = weight.dtype
        if ctx.accumulated:
            ctx.save_for_backward(grad_hidden)
        else:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(*result[1:])
        return result

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
        gradients = [scaled(gradient, upstream) for gradient in ctx.saved_tensors]
        return (gradients[0], None if ctx.accumulated else gradients[1], *[None] * 9)


def _linear_token_loss(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    tokens = TokenInputs(*arguments[:8])
    vocab_size, mode, kl, low, high, dual, kl_coefficient, entropy_coefficient = arguments[8:16]
    spec = LossSpec(mode, low, high, dual, kl, kl_coefficient, entropy_coefficient)
    rows_per_chunk, with_gradient = arguments[16:]
    result, grad_hidden, grad_weight = chunk_loop(
        hidden, weight, tokens, spec, vocab_size, rows_per_chunk, with_gradient
    )
    return (*result, grad_hidden, grad_weight.to(weight.dtype))


for _backend in ("CPU", "CUDA"):
    torch.library.impl("megarlx::linear_token_loss", _backend, _linear_token_loss)


@torch.library.register_fake("megarlx::linear_token_loss")
def _fake(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    with_gradient = arguments[-1]
    gradients = [x.new_empty(x.shape if with_gradient else 0) for x in (hidden, weight)]
    return (*empty_results(hidden, hidden.shape[0]), *gradients)
