"""The token loss from logits: one pass over each row for loss and gradient.

    loss = sum over tokens of mask · token_weight / normalizer
           · (objective + kl_coefficient · KL - entropy_coefficient · entropy

              + z_loss · (log Z)²)

The objectives and KL estimators are LossSpec's. Gradient flows through the token's log-prob lp, its
entropy H = -Σ p log p and log Z only: with p = softmax(logits / temperature),
    d lp / d logits = ([target] - p) / temperature,   d H / d logits = -p (log p + H) / temperature,
    d log Z / d logits = p / temperature.
Advantages, old and reference log-probs, token weights, the normaliser and the temperature are
constants. Second derivatives are not there: differentiating a gradient raises.

One call of a native op does all of it where the formula is the op's and the row is whole. Over
shards, or with a loss that is a function, two ops stand around the seam (loss_seam.py): one for a
row's sums, one for its gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megarlx.comm.collectives import all_reduce_
from megarlx.ops.loss_seam import row_terms
from megarlx.ops.loss_spec import METRICS, LossSpec, TokenLoss
from megarlx.ops.token_inputs import (
    LossInputs,
    TokenInputs,
    check_floats,
    check_vocab_size,
    precision_of,
    prepare,
)

if TYPE_CHECKING:
    from megarlx.comm.groups import Group

PARTIALS = 4  # maximum, Σ exp, Σ exp · z, target's z


def token_loss(
    logits: Tensor,
    targets: Tensor,
    spec: LossSpec,
    *,
    normalizer: Tensor | float,
    mask: Tensor | None = None,
    advantages: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    token_weights: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    sequence: Tensor | None = None,
    sequences: int = 0,
    temperature: Tensor | float = 1.0,
    group: Group | None = None,
    vocab_size: int | None = None,
) -> TokenLoss:
    """The loss of `logits` [..., V] for `targets` [...]; see the formulas at the top of this file.

    Every token input has the shape of `targets`. Where `mask` is false a token counts for nothing,
    whatever its logits and target are. Without old_logprobs the policy is its own old one: ratios
    are 1 and still have a gradient. A normaliser of 0 (a batch without tokens) gives a loss and
    gradients of 0. Ids from `vocab_size` on are padding. With a `group`, logits hold this rank's
    slice of the vocabulary, and targets are global ids. `sequence` is each token's, below
    `sequences`; it and `rollout_logprobs` are for functions that look at them.

    A target outside the vocabulary raises on the CPU; on a GPU, which cannot say so without being
    waited for, it makes loss, log-prob and gradient of its token NaN, as do NaN logits and a
    temperature tensor that is not positive.
    """
    op = "token_loss"
    check_floats(op, "logits", logits, 1)
    size = 1 if group is None else group.size
    vocab_size = check_vocab_size(op, vocab_size, logits.shape[-1] * size)
    inputs = LossInputs(
        *(targets, mask, advantages, old_logprobs, ref_logprobs, token_weights),
        *(rollout_logprobs, sequence, sequences),
    )
    shape = logits.shape[:-1]
    tokens = prepare(
        op, spec, logits, shape, inputs, normalizer=normalizer, temperature=temperature
    )
    rows = logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])
    with_gradient = torch.is_grad_enabled() and logits.requires_grad
    if spec.is_native and (group is None or size == 1):
        result = torch.ops.megarlx.token_loss(
            rows, *tokens.arguments, vocab_size, *spec.arguments, with_gradient
        )[:4]
    else:
        result = _TokenLoss.apply(rows, tokens, spec, group, vocab_size, with_gradient)
    return shaped(result, targets.shape)


def shaped(result: tuple[Tensor, Tensor, Tensor, Tensor], shape: torch.Size) -> TokenLoss:
    loss, logprobs, entropy, metrics = result
    if len(shape) != 1:
        logprobs, entropy = logprobs.reshape(shape), entropy.reshape(shape)
    return TokenLoss(loss, logprobs, entropy, metrics)


def move_to_maximum_(partials: Tensor, maximum: Tensor) -> Tensor:
    """Moves the sums of `partials` [4, tokens] to the maximum of all shards: they then add up."""
    step = (partials[0] - maximum).clamp_min(-1000.0)
    factor = step.exp()
    partials[2].addcmul_(partials[1], step).mul_(factor)
    partials[1].mul_(factor)
    partials[0].copy_(maximum)
    return partials


def combine_partials_(partials: Tensor, group: Group | None) -> Tensor:
    """The partials of the whole vocabulary, in place: one maximum and one sum over the group."""
    if group is None or group.size == 1:
        return partials
    maximum = all_reduce_(partials[0].clone(), group, op="max")
    move_to_maximum_(partials, maximum)
    all_reduce_(partials[1:], group, op="sum")
    return partials


def scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """gradient · upstream; a factor of 1, the usual one, costs nothing.

    On a GPU, where that is not known, only the last backward may write into the saved gradient.
    """
    if type(upstream) is Tensor and not torch.ops.megarlx._graph_is_kept():
        torch.ops.megarlx._scale_gradient_(gradient, upstream)
        return gradient
    if upstream.device.type == "cpu" and type(upstream) is Tensor and upstream.item() == 1:
        return gradient
    return gradient * upstream.to(gradient.dtype)


class _TokenLoss(torch.autograd.Function):
    """The logits may be this rank's slice of the vocabulary; so is their gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        tokens: TokenInputs,
        spec: LossSpec,
        group: Group | None,
        vocab_size: int,
        with_gradient: bool,
    ) -> tuple[Tensor, ...]:
        place = (0 if group is None else group.rank * logits.shape[1], vocab_size)
        of_rows = (tokens.targets, tokens.mask)
        ops = torch.ops.megarlx
        partials = ops.token_loss_sums(logits, *of_rows, tokens.temperature, *place)
        combine_partials_(partials, group)
        terms = row_terms(partials, tokens, spec, with_gradient=with_gradient)
        if with_gradient:
            gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
            slopes = (*of_rows, *terms.derivatives, tokens.temperature, *place)
            ops.token_loss_gradient_(logits, partials, *slopes, gradient)
            ctx.save_for_backward(gradient)
        sums = terms.sums.to(partials.dtype)
        result = (sums[0].clone(), terms.logprobs, terms.entropy, sums[1:])
        ctx.mark_non_differentiable(*result[1:])
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (scaled(gradient, upstream), *[None] * 5)


def empty_results(like: Tensor, tokens: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the native ops."""

    def empty(*shape: Any) -> Tensor:
        return like.new_empty(shape, dtype=precision_of(like.dtype))

    return empty(), empty(tokens), empty(tokens), empty(len(METRICS))


@torch.library.register_fake("megarlx::token_loss")
def _token_loss_fake(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if not arguments[-1]:
        gradient = logits.new_empty(0)
    return (*empty_results(logits, logits.shape[0]), gradient)


@torch.library.register_fake("megarlx::token_loss_sums")
def _token_loss_sums_fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(PARTIALS, logits.shape[0], dtype=precision_of(logits.dtype))


@torch.library.register_fake("megarlx::token_loss_gradient_")
@torch.library.register_fake("megarlx::_scale_gradient_")
def _writes_only(*_: Any) -> None:
    return None
