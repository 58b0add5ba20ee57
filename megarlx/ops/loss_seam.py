"""The seam around a policy loss: from a row's sums to its loss and the derivatives of it.

The function of policy_loss.py sees log-probs and entropies as leaves of their own, so that its
gradient is known here, in the forward, whatever the backward of the model is like. Inputs of
masked tokens are 0 before it is called, and whatever it makes of them is not selected after it.

Letters: n tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megarlx.ops.loss_spec import METRICS, LossSpec, refuse
from megarlx.ops.policy_loss import LARGEST_LOG_RATIO, LossTokens
from megarlx.ops.token_inputs import TokenInputs


class Derivatives(NamedTuple):
    """Of the loss of each token, [n], by what its logits change."""

    by_logprob: Tensor
    by_entropy: Tensor
    by_log_z: Tensor


class RowTerms(NamedTuple):
    logprobs: Tensor  # [n]
    entropy: Tensor  # [n]
    sums: Tensor  # fp64 [1 + metrics], the loss and the metrics of spec.metrics, over the tokens
    derivatives: Derivatives


def row_terms(
    partials: Tensor, tokens: TokenInputs, spec: LossSpec, *, with_gradient: bool
) -> RowTerms:
    """`partials` [4, n] of the whole vocabulary. Without gradient the derivatives mean nothing."""
    maximum, exp_sum, exp_z_sum, target = partials
    if tokens.mask is not None:
        exp_sum = exp_sum.where(tokens.mask, 1)  # the others are 0 there: log-prob and entropy too
    log_sum = exp_sum.log()
    entropy = log_sum - exp_z_sum / exp_sum
    # Beside one large logit the others vanish, and rounding alone could leave this above 0.
    logprob = (target - maximum - log_sum).clamp_max(0)
    log_z = maximum + log_sum
    t, scale = seen(tokens, logprob), scale_of(tokens, logprob)
    objective, by_logprob, by_entropy, declared = objectives(
        spec, t, logprob, entropy, scale if with_gradient else None
    )
    kl, kl_slope = divergence(spec, t.reference, logprob)
    loss = objective + spec.kl_coefficient * kl - spec.entropy_coefficient * entropy
    by_log_z = torch.zeros_like(log_z)
    if spec.z_loss:
        loss, by_log_z = loss + spec.z_loss * log_z.square(), 2 * spec.z_loss * log_z
    gap = logprob - t.old
    r = gap.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
    fields = {
        "tokens": torch.ones_like(r),
        "kl": kl,
        "old_kl": r - 1 - gap,
        "ratio": r,
        "nll": -logprob,
        "entropy": entropy,
        **declared,
    }

    def learned(value: Tensor) -> Tensor:
        return value if tokens.mask is None else value.where(tokens.mask, 0)

    slopes = (
        by_logprob + scale * spec.kl_coefficient * kl_slope,
        by_entropy - scale * spec.entropy_coefficient,
        scale * by_log_z,
    )
    return RowTerms(
        logprob,
        entropy,
        summed(spec, learned(scale * loss), {k: learned(v) for k, v in fields.items()}),
        Derivatives(*map(learned, slopes)),
    )


def seen(tokens: TokenInputs, logprob: Tensor) -> LossTokens:
    """What the loss gets to see: 0, and the sequence -1, where a token is masked."""
    mask = tokens.mask

    def clean(value: Tensor | None, fill: int = 0) -> Tensor | None:
        return value if value is None or mask is None else value.where(mask, fill)

    advantages, old = clean(tokens.advantages), clean(tokens.old_logprobs)
    return LossTokens(
        torch.zeros_like(logprob) if advantages is None else advantages,
        logprob.detach() if old is None else old,
        clean(tokens.rollout_logprobs),
        clean(tokens.ref_logprobs),
        clean(tokens.sequence, -1),
        tokens.sequences,
    )


def objectives(
    spec: LossSpec, t: LossTokens, logprob: Tensor, entropy: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """(objectives, derivatives of Σ scale · objective by log-prob and by entropy, metrics): [n].

    A loss of sequences has an objective of one token change with the log-prob of another, so the
    scale stands inside. Without one there are no derivatives.
    """
    nothing, with_gradient = torch.zeros_like(logprob), scale is not None
    if spec.mode == "nll":
        return -logprob, nothing if scale is None else -scale, nothing, {}
    leaves = (
        logprob.detach().requires_grad_(with_gradient),
        entropy.detach().requires_grad_(with_gradient),
    )
    with torch.set_grad_enabled(with_gradient):
        objective, declared = checked(spec, spec.loss(t, *leaves, spec.c), logprob)
        slopes: Sequence[Tensor | None] = (None, None)
        if objective.requires_grad:
            slopes = torch.autograd.grad(objective, leaves, scale, allow_unused=True)
    known = [nothing if slope is None else slope for slope in slopes]
    return objective.detach(), known[0], known[1], declared


def checked(spec: LossSpec, found: object, logprob: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What the function returned, in the shape that it has to have."""
    names = spec.loss.metrics
    objective, declared = found if isinstance(found, tuple) and len(found) == 2 else (found, {})
    what = f"the result of the policy loss {spec.loss.name}"
    if not isinstance(objective, Tensor):
        refuse("linear_token_loss", what, f"a {type(objective).__name__}", "a tensor of objectives")
    if objective.shape != logprob.shape or objective.dtype != logprob.dtype:
        given = f"{objective.dtype} {list(objective.shape)}"
        allowed = f"an objective a token, {logprob.dtype} {list(logprob.shape)}"
        refuse("linear_token_loss", what, given, allowed)
    if not isinstance(declared, dict) or set(declared) != set(names):
        made = str(list(declared)) if isinstance(declared, dict) else f"a {type(declared).__name__}"
        allowed = f"those that it declares, {list(names)}"
        refuse("linear_token_loss", f"the metrics in {what}", made, allowed)
    for name, value in declared.items():
        if value.shape != logprob.shape:
            allowed = str(list(logprob.shape))
            refuse("linear_token_loss", f"{name} in {what}", str(list(value.shape)), allowed)
    return objective, {k: v.detach().to(logprob.dtype) for k, v in declared.items()}


def divergence(spec: LossSpec, reference: Tensor | None, logprob: Tensor) -> tuple[Tensor, Tensor]:
    """(KL estimate, its derivative by the log-prob), [n]."""
    if spec.kl == "none" or reference is None:
        return torch.zeros_like(logprob), torch.zeros_like(logprob)
    gap = reference - logprob
    if spec.kl == "k1":
        return -gap, torch.ones_like(gap)
    if spec.kl == "k2":
        return gap.square() / 2, -gap
    r = gap.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
    return r - 1 - gap, 1 - r


def scale_of(tokens: TokenInputs, logprob: Tensor) -> Tensor:
    """[n], what each token's loss is multiplied by: 0 where it is masked, and where the normaliser
    is 0, of a batch without tokens."""
    weights = tokens.token_weights
    scale = torch.ones_like(logprob) if weights is None else weights
    scale = torch.where(tokens.normalizer == 0, 0, scale / tokens.normalizer)
    return scale if tokens.mask is None else scale.where(tokens.mask, 0)


def summed(spec: LossSpec, loss: Tensor, fields: dict[str, Tensor]) -> Tensor:
    """In fp64, so that the number of tokens does not limit what a sum can resolve."""
    names = [name for name in spec.metrics if name != "ratio_max"]
    nothing = torch.zeros_like(loss)
    table = torch.stack([loss, *(fields.get(name, nothing) for name in names)])
    sums = dict(zip(["loss", *names], table.sum(1, dtype=torch.float64), strict=True))
    sums["ratio_max"] = fields["ratio"].amax().double()
    return torch.stack([sums[name] for name in ("loss", *spec.metrics)])


def add_sums(total: Tensor, more: Tensor) -> Tensor:
    """Those of two chunks together: sums, and one maximum."""
    both = total + more
    at = 1 + METRICS.index("ratio_max")
    both[at] = torch.maximum(total[at], more[at])
    return both
