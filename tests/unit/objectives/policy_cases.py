"""Sampled sequences as a [N, L] rectangle, to be compared with formulas written for one.

Letters: N sequences, L longest length, V vocabulary, T tokens of all sequences, one after another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megarlx.config.policy import PolicyConfig
from megarlx.objectives.losses import loss_spec
from megarlx.objectives.policy_loss import policy_fields
from megarlx.ops import token_loss
from megarlx.rollouts.completions import Completions

MAX_COMPLETION_TOKENS = 11


@dataclass(frozen=True)
class Rectangle:
    logits: (
        Tensor  # [N, L, V], of the token at the same place (a model gives them one place before)
    )
    ids: Tensor  # [N, L]
    real: Tensor  # bool [N, L]
    written: Tensor  # bool [N, L]
    old: Tensor  # [N, L] like the following
    ref: Tensor
    rollout: Tensor
    advantages: Tensor  # [N], or [tokens] where the turns of a sequence differ
    truncated: Tensor  # bool [N]

    def logprobs(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(2, self.ids[..., None])[..., 0]

    def entropy(self, logits: Tensor) -> Tensor:
        logp = logits.log_softmax(-1)
        return -(logp.exp() * logp).sum(-1)

    def flat(self, values: Tensor) -> Tensor:
        return values[self.real]

    @property
    def completions(self) -> Completions:
        return Completions(
            tokens=self.flat(self.ids),
            lengths=self.real.sum(1),
            written=self.flat(self.written),
            old_logprobs=self.flat(self.old),
            rollout_logprobs=self.flat(self.rollout),
            ref_logprobs=self.flat(self.ref),
            truncated=self.truncated,
        )


def rectangle(sequences: int = 6, vocabulary: int = 9, spread: float = 0.4) -> Rectangle:
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.tensor([4, 9, 6, 5, 9, 7][:sequences])
    prompts = torch.tensor([2, 3, 1, 3, 2, 2][:sequences])
    longest = int(lengths.max())
    places = torch.arange(longest)
    real = places < lengths[:, None]
    written = real & (places >= prompts[:, None])
    written[1, 5] = False  # what an environment said in the middle
    logits = normal(sequences, longest, vocabulary)
    ids = torch.randint(0, vocabulary, (sequences, longest), generator=generator)
    at = Rectangle(logits, ids, real, written, *[normal(sequences, longest)] * 3,
                   normal(sequences), torch.arange(sequences) == 4)  # fmt: skip
    now = at.logprobs(logits)
    noisy = [(now + spread * normal(sequences, longest)).where(written, 0) for _ in range(3)]
    return replace(at, old=noisy[0], ref=noisy[1], rollout=noisy[2])


def ours(config: PolicyConfig, case: Rectangle) -> tuple[Tensor, Tensor]:
    """(loss, its gradient in the logits [N, L, V])."""
    logits = case.logits.detach().requires_grad_()
    completions = case.completions
    fields = policy_fields(
        config, completions, case.advantages, max_completion_tokens=MAX_COMPLETION_TOKENS
    )
    loss = token_loss(
        logits[case.real],
        completions.tokens,
        loss_spec(config),
        normalizer=fields.sequence_weights.sum(),
        mask=fields.mask,
        advantages=fields.advantages,
        old_logprobs=fields.old_logprobs,
        rollout_logprobs=fields.rollout_logprobs,
        ref_logprobs=fields.ref_logprobs,
        token_weights=fields.token_weights,
        sequence=completions.sequence_of_token,
        sequences=len(case.ids),
    ).loss
    return loss.detach(), torch.autograd.grad(loss, logits)[0]
