"""From sampled sequences and their advantages to the inputs of a policy loss.

overlong        samples that ended at the limit are not learned from
importance cap  advantages times min(exp(old - rollout), cap)
aggregation     weighs a token's whole loss, KL and entropy too

Letters: T tokens of all sequences one after another, N sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megarlx import plug
from megarlx.config.policy import PolicyConfig
from megarlx.ops.policy_loss import LARGEST_LOG_RATIO, ratio
from megarlx.rollouts.completions import Completions, sequence_sum


@dataclass(frozen=True)
class PolicyFields:
    """Per-token inputs of the loss, each at the place [T] of the token it is about."""

    mask: Tensor  # bool
    advantages: Tensor
    old_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    token_weights: Tensor | None
    sequence_weights: Tensor  # fp64 [N], what each sequence adds to the normaliser


def policy_fields(
    config: PolicyConfig,
    completions: Completions,
    advantages: Tensor,
    *,
    max_completion_tokens: int,
) -> PolicyFields:
    """`advantages` are one a sequence [N], or one a token [T] (turns of an episode differ)."""
    made = completions
    mask = made.written
    if config.overlong == "mask":
        truncated = _required(made.truncated, "truncated", "overlong = 'mask'")
        mask = mask & ~truncated[made.sequence_of_token]
    if advantages.shape == made.lengths.shape and advantages.shape != made.tokens.shape:
        advantages = advantages[made.sequence_of_token]
    if advantages.shape != made.tokens.shape or not advantages.isfinite().all():
        raise ValueError(
            f"policy loss: advantages of shape {tuple(advantages.shape)}; they must be finite, one "
            f"for each of {len(made.lengths)} sequences or each of {len(made.tokens)} tokens"
        )
    ref = None
    if config.kl_of_loss != "none":
        ref = _required(made.ref_logprobs, "ref_logprobs", f"kl = '{config.kl}'")
    old = made.old_logprobs
    if config.importance_cap is not None:
        reason = f"importance_cap = {config.importance_cap}"
        sampled = _required(made.rollout_logprobs, "rollout_logprobs", reason)
        weights = ratio(_required(old, "old_logprobs", reason), sampled)
        advantages = advantages * weights.clamp_max(config.importance_cap)
    weights_of_token, per_sequence = _aggregated(config, made, mask, max_completion_tokens)
    if weights_of_token is not None:
        weights_of_token = weights_of_token.to(advantages.dtype)
    return PolicyFields(
        mask, advantages, old, made.rollout_logprobs, ref, weights_of_token, per_sequence
    )


def _aggregated(
    config: PolicyConfig, made: Completions, mask: Tensor, max_completion_tokens: int
) -> tuple[Tensor | None, Tensor]:
    aggregation = plug.resolve("aggregation", config.aggregation)
    counts, sequence = sequence_sum(mask.double(), made), made.sequence_of_token
    of_token, of_sequence = aggregation(counts, sequence, config.settings(max_completion_tokens))
    shapes = [None if x is None else tuple(x.shape) for x in (of_token, of_sequence)]
    if shapes not in ([None, (len(counts),)], [(len(sequence),), (len(counts),)]):
        raise ValueError(
            f"aggregation {config.aggregation}: weights of shape {shapes[0]} and {shapes[1]}; they "
            f"must be one for each of {len(sequence)} tokens (or None) and each of {len(counts)} "
            "sequences"
        )
    return of_token, of_sequence.double()


def log_ratios(completions: Completions) -> Tensor:
    """[N]: how much likelier each whole sample is than under the reference, Σ old - ref."""
    made, reason = completions, "kl = 'reward'"
    old = _required(made.old_logprobs, "old_logprobs", reason)
    ref = _required(made.ref_logprobs, "ref_logprobs", reason)
    return sequence_sum((old.double() - ref.double()).where(made.written, 0), made)


def gap_sums(rollout: Tensor, training: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """How far sampler and trainer disagree about the tokens in `mask`: as sums (and one maximum),
    so that ranks can add theirs up; divide `gap` and `kl` by `tokens`."""
    gap = (training - rollout).where(mask, 0).double()
    return {
        "gap": gap.abs().sum(),
        "kl": (gap.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).expm1() - gap).sum(),
        "gap_max": gap.abs().max() if len(gap) else gap.sum(),
        "tokens": mask.sum(dtype=torch.float64),
    }


def _required(value: Tensor | None, name: str, reason: str) -> Tensor:
    if value is None:
        raise ValueError(f"policy loss: {name} is missing; {reason} needs it")
    return value
