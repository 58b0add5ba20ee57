"""How far the log-probs of sampling are from those that training computes for the same tokens.

The weights are the same, but decoding sums in another order (and in another precision on CUDA).
What grows here grows unseen in the ratios of a policy update, so it is measured, not assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megarlx.comm.collectives import all_reduce_
from megarlx.generation.requests import Completion
from megarlx.model.build import ParallelModel
from megarlx.model.token_scores import Text, token_scores


@dataclass(frozen=True)
class LogprobGap:
    """Over all tokens of all data-parallel ranks; the same numbers on every rank."""

    mean: float  # |training - sampling|
    max: float
    kl: float  # of sampling from training: mean of r - 1 - log r, r = p_training / p_sampling
    tokens: int


def logprob_gap(
    model: ParallelModel, completions: Sequence[Completion], *, tokens_per_pass: int = 4096
) -> LogprobGap:
    """Every rank of the model is given the same completions, each data-parallel rank its own."""
    training = training_logprobs(model, completions, tokens_per_pass=tokens_per_pass)
    # [sum of the gap, sum of the divergence, tokens], on one rank of each copy of the model
    sums, most = torch.zeros(3, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    if model.pipeline.holds_last_stage and completions:
        sampling = torch.cat([c.logprobs for c in completions]).double()
        ratio = torch.cat(training).double() - sampling
        gap, divergence = ratio.abs().sum(), (ratio.expm1() - ratio).sum()
        sums = torch.tensor([float(gap), float(divergence), len(ratio)], dtype=torch.float64)
        most = ratio.abs().max().reshape(1)
    for group in (model.mesh.pp, model.mesh.dp):
        all_reduce_(sums, group)
        all_reduce_(most, group, op="max")
    tokens = max(float(sums[2]), 1.0)
    return LogprobGap(float(sums[0]) / tokens, float(most), float(sums[1]) / tokens, int(sums[2]))


def training_logprobs(
    model: ParallelModel, completions: Sequence[Completion], *, tokens_per_pass: int = 4096
) -> list[Tensor]:
    """The model's log-prob of every completion's tokens as training computes it, without gradient.

    On the ranks of the last pipeline stage; elsewhere nothing.
    """
    texts = [
        Text(torch.cat((torch.tensor(list(c.request.prompt)), c.tokens)), len(c.request.prompt))
        for c in completions
    ]
    return [s.logprobs for s in token_scores(model, texts, tokens_per_pass=tokens_per_pass)]
