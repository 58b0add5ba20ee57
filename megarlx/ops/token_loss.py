"""The token loss from logits: one pass over each row for loss and gradient.

    loss = sum over tokens of mask · token_weight / normalizer
           · (objective + kl_coefficient · KL - entropy_coefficient · entropy)

The objectives and KL estimators are LossSpec's. Gradient flows through the token's log-prob lp and
its entropy H = -Σ p log p only: with p = softmax(logits / temperature),
    d lp / d logits = ([target] - p) / temperature,   d H / d logits = -p (log p + H) / temperature.
Advantages, old and reference log-probs, token weights, the normaliser and the temperature are
constants. Second derivatives are not there: differentiating a gradient raises.

Sequence-level ratios take a first pass without gradient for the log-probs. With the ratio s of a
sequence, `ppo_clip` with old_logprobs = logprobs - log s has each token's ratio equal s, with the
gradient of s · lp (gspo, sampo); as a factor, token_weights does the same for `reinforce` (sapo,
truncated importance weights).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megarlx.comm.collectives import all_reduce_
from megarlx.ops.loss_spec import LossSpec, TokenLoss
from megarlx.ops.token_inputs import (
    TokenInputs,
    check_floats,
    check_vocab_size,
    precision_of,
    prepare,
)

if TYPE_CHECKING:
    from megarlx.comm.groups import Group

METRIC_COUNT = 8
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
    temperature: Tensor | float = 1.0,
    group: Group | None = None,
    vocab_size: int | None = None,
) -> TokenLoss:
    """The loss of `logits` [..., V] for `targets` [...]; see the formulas at the top of this file.

    Every token input has the shape of `targets`. Where `mask` is false a token counts for nothing,
    whatever its logits and target are. Without old_logprobs the policy is its own old one: ratios
    are 1 and still have a gradient. A normaliser of 0 (a batch without tokens) gives a loss and
    gradients of 0. Ids from `vocab_size` on are padding. With a `group`, logits hold this rank's
    slice of the vocabulary, and targets are global ids.

    A target outside the vocabulary raises on the CPU; on a GPU, which cannot say so without being
    waited for, it makes loss, log-prob and gradient of its token NaN, as do NaN logits and a
    temperature tensor that is not positive.
    """
    op = "token_loss"
    check_floats(op, "logits", logits, 1)
    size = 1 if group is None else group.size
    vocab_size = check_vocab_size(op, vocab_size, logits.shape[-1] * size)
    tokens = prepare(
        op,
        spec,
        logits,
        logits.shape[:-1],
        targets=targets,
        mask=mask,
        advantages=advantages,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        token_weights=token_weights,
        normalizer=normalizer,
        temperature=temperature,
    )
    rows = logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])
    with_gradient = torch.is_grad_enabled() and logits.requires_grad
    if group is None or size == 1:
        result = torch.ops.megarlx.token_loss(
            rows, *tokens.arguments, vocab_size, *spec.arguments, with_gradient
        )[:4]
    else:
        result = _ShardedTokenLoss.apply(rows, tokens, spec, group, vocab_size, with_gradient)
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


def combine_partials_(partials: Tensor, group: Group) -> Tensor:
    """The partials of the whole vocabulary, in place: one maximum and one sum over the group."""
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


class _ShardedTokenLoss(torch.autograd.Function):
    """The logits are this rank's slice of the vocabulary, and so is their gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        tokens: TokenInputs,
        spec: LossSpec,
        group: Group,
        vocab_size: int,
        with_gradient: bool,
    ) -> tuple[Tensor, ...]:
        vocab_start = group.rank * logits.shape[1]
        partials = torch.ops.megarlx.token_loss_partials(
            logits, tokens.targets, tokens.mask, tokens.temperature, vocab_start, vocab_size
        )
        *result, gradient = torch.ops.megarlx.token_loss_finish(
            logits,
            combine_partials_(partials, group),
            *tokens.arguments,
            vocab_start,
            vocab_size,
            *spec.arguments,
            with_gradient,
        )
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(*result[1:])
        return tuple(result)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (scaled(gradient, upstream), *[None] * 5)


def empty_results(like: Tensor, tokens: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def empty(*shape: Any) -> Tensor:
        return like.new_empty(shape, dtype=precision_of(like.dtype))

    return empty(), empty(tokens), empty(tokens), empty(METRIC_COUNT)


@torch.library.register_fake("megarlx::token_loss")
def _token_loss_fake(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if not arguments[-1]:
        gradient = logits.new_empty(0)
    return (*empty_results(logits, logits.shape[0]), gradient)


@torch.library.register_fake("megarlx::token_loss_finish")
def _token_loss_finish_fake(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _token_loss_fake(logits, *arguments)


@torch.library.register_fake("megarlx::token_loss_partials")
def _token_loss_partials_fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(PARTIALS, logits.shape[0], dtype=precision_of(logits.dtype))


@torch.library.register_fake("megarlx::_token_loss_rows_")
@torch.library.register_fake("megarlx::_scale_gradient_")
def _writes_only(*_: Any) -> None:
    return None


@torch.library.register_fake("megarlx::_token_loss_sums")
def _token_loss_sums_fake(fields: Tensor) -> tuple[Tensor, Tensor]:
    return fields.new_empty(()), fields.new_empty(METRIC_COUNT)


def token_loss_reference(
    logits: Tensor, tokens: TokenInputs, vocab_size: int, spec: LossSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, log-probs, entropy) in plain torch, differentiable: what the op is compared with."""
    precision = precision_of(logits.dtype)
    mask = tokens.mask if tokens.mask is not None else torch.ones_like(tokens.targets).bool()
    z = logits[:, :vocab_size].to(precision) / tokens.temperature
    logp = z.log_softmax(-1)
    entropy = -(logp.exp() * logp.clamp_min(torch.finfo(precision).min)).sum(-1)
    targets = tokens.targets.where(mask, 0)
    lp = logp.gather(1, targets[:, None])[:, 0]
    old = lp.detach() if tokens.old_logprobs is None else tokens.old_logprobs
    ratio = (lp - old).clamp(-80, 80).exp()
    low, high = 1 - spec.clip_low, 1 + spec.clip_high
    if spec.mode == "nll":
        objective = -lp
    else:
        advantages = tokens.advantages
        assert advantages is not None
        if spec.mode == "reinforce":
            objective = -advantages * lp
        elif spec.mode == "cispo":
            objective = -ratio.clamp(low, high).detach() * advantages * lp
        else:
            surrogate = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
            if spec.dual_clip:
                bounded = torch.maximum(surrogate, spec.dual_clip * advantages)
                surrogate = torch.where(advantages < 0, bounded, surrogate)
            objective = -surrogate
    loss = objective - spec.entropy_coefficient * entropy
    if spec.kl != "none":
        assert tokens.ref_logprobs is not None
        gap = tokens.ref_logprobs - lp
        kl = {"k1": -gap, "k2": gap**2 / 2, "k3": gap.clamp(-80, 80).exp() - 1 - gap}[spec.kl]
        loss = loss + spec.kl_coefficient * kl
    if tokens.token_weights is not None:
        loss = loss * tokens.token_weights
    total = torch.where(mask, loss, 0).sum() / tokens.normalizer
    return total, torch.where(mask, lp, 0), torch.where(mask, entropy, 0)
