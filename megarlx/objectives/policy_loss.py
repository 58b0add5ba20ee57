"""From sampled sequences and their advantages to the inputs of a policy loss.

overlong        samples that ended at the limit are not learned from
importance cap  advantages times min(exp(old - rollout), cap)
aggregation     weighs a token's whole loss, KL and entropy too

Letters: T tokens of all sequences one after another, N sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megarlx import plug
from megarlx.config.policy import PolicyConfig
from megarlx.ops.policy_loss import LARGEST_LOG_RATIO, ratio


@dataclass(frozen=True)
class Completions:
    """What was sampled. A token's log-prob stands at the token's own place, 0 where not `written`.

    `old_logprobs` are those of the training pass, before the first update on these sequences.
    None: on-policy, every ratio is 1. `rollout_logprobs` are those of the sampler.
    """

    tokens: Tensor  # int64 [T], each prompt with its completion
    lengths: Tensor  # int64 [N]
    written: Tensor  # bool [T], by the policy (its stop token too); a sequence's first never is
    old_logprobs: Tensor | None = None  # [T]
    rollout_logprobs: Tensor | None = None  # [T]
    ref_logprobs: Tensor | None = None  # [T]
    truncated: Tensor | None = None  # bool [N], ended by the length limit

    def __post_init__(self) -> None:
        total, count = len(self.tokens), len(self.lengths)
        for name in ("written", "old_logprobs", "rollout_logprobs", "ref_logprobs", "truncated"):
            value = getattr(self, name)
            expected = count if name == "truncated" else total
            if value is not None and value.shape != (expected,):
                raise ValueError(
                    f"completions: {name} has the shape {tuple(value.shape)}; expected "
                    f"({expected},)"
                )
        if int(self.lengths.sum()) != total or (count and int(self.lengths.min()) < 1):
            raise ValueError(
                f"completions: lengths {self.lengths.tolist()} must be at least 1 and add up to "
                f"the {total} tokens"
            )
        if self.written[self.offsets[:-1]].any():
            raise ValueError("completions: the first token of a sequence cannot be one to learn")

    @staticmethod
    def of(
        prompts: Sequence[Sequence[int]],
        sampled: Sequence[Tensor],
        *,
        rollout_logprobs: Sequence[Tensor] | None = None,
        truncated: Sequence[bool] | None = None,
    ) -> Completions:
        """From each sample's prompt, its sampled ids [n] and their log-probs [n]."""

        def place(values: Sequence[Tensor]) -> Tensor:
            """Each sample's values behind zeros for its prompt."""
            pairs = zip(prompts, values, strict=True)
            return torch.cat([F.pad(value, (len(prompt), 0)) for prompt, value in pairs])

        whole = [
            torch.cat((torch.tensor(list(prompt), dtype=torch.int64, device=ids.device), ids))
            for prompt, ids in zip(prompts, sampled, strict=True)
        ]
        device = whole[0].device
        return Completions(
            torch.cat(whole),
            torch.tensor([len(ids) for ids in whole], device=device),
            place([torch.ones_like(ids, dtype=torch.bool) for ids in sampled]),
            rollout_logprobs=None if rollout_logprobs is None else place(rollout_logprobs),
            truncated=None if truncated is None else torch.tensor(truncated, device=device),
        )

    @property
    def offsets(self) -> Tensor:
        """[N + 1]"""
        return torch.cat((self.lengths.new_zeros(1), self.lengths.cumsum(0)))

    @property
    def sequence_of_token(self) -> Tensor:
        sequences = torch.arange(len(self.lengths), device=self.lengths.device)
        return sequences.repeat_interleave(self.lengths)


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


def sequence_sum(values: Tensor, completions: Completions) -> Tensor:
    """[T] -> [N]"""
    return torch.segment_reduce(values, "sum", lengths=completions.lengths)


def places_of(lengths: Tensor, chosen: Tensor) -> Tensor:
    """Where the parts of these numbers stand in a row of parts of these lengths."""
    ends = lengths.cumsum(0)
    bounds = zip((ends - lengths)[chosen].tolist(), ends[chosen].tolist(), strict=True)
    pieces = [torch.arange(begin, end, device=lengths.device) for begin, end in bounds]
    return torch.cat(pieces) if pieces else lengths.new_zeros(0)


def select(completions: Completions, sequences: Tensor) -> Completions:
    """The sequences of these numbers, in this order: a minibatch."""
    index = places_of(completions.lengths, sequences)

    def take(value: Tensor | None, where: Tensor) -> Tensor | None:
        return None if value is None else value[where]

    return replace(
        completions,
        tokens=completions.tokens[index],
        written=completions.written[index],
        lengths=completions.lengths[sequences],
        old_logprobs=take(completions.old_logprobs, index),
        rollout_logprobs=take(completions.rollout_logprobs, index),
        ref_logprobs=take(completions.ref_logprobs, index),
        truncated=take(completions.truncated, sequences),
    )


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


def overlong_penalty(tokens: Tensor, max_tokens: int, buffer: float) -> Tensor:
    """0 down to -1 over the last `buffer` (a share) of the `max_tokens` a completion may have."""
    width = buffer * max_tokens
    return -((tokens - (max_tokens - width)) / width).clamp(0, 1)


def _required(value: Tensor | None, name: str, reason: str) -> Tensor:
    if value is None:
        raise ValueError(f"policy loss: {name} is missing; {reason} needs it")
    return value
