"""Sampled sequences one after another, and sums over them.

Letters: T tokens of all sequences one after another, N sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


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


def overlong_penalty(tokens: Tensor, max_tokens: int, buffer: float) -> Tensor:
    """0 down to -1 over the last `buffer` (a share) of the `max_tokens` a completion may have."""
    width = buffer * max_tokens
    return -((tokens - (max_tokens - width)) / width).clamp(0, 1)
