"""How far the log-probs of sampling are from those that training computes for the same tokens.

The weights are the same, but decoding sums in another order (and in another precision on CUDA).
What grows here grows unseen in the ratios of a policy update, so it is measured, not assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megarlx.comm.collectives import all_reduce_
from megarlx.generation.requests import Completion
from megarlx.model.build import ParallelModel
from megarlx.ops import LossSpec, TokenLoss, linear_token_loss

TILE = 16  # tokens of a pass are a multiple of it, for sequence parallelism


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
    found: list[Tensor] = []
    passes = _passes(completions, tokens_per_pass)
    # Passes are padded to one length: a pipeline makes a schedule for each shape.
    longest = max((sum(map(_length, part)) for part in passes), default=0)
    padded = -(-longest // TILE) * TILE
    device = model.pipeline.device
    for part in passes:
        captured: list[Tensor] = []

        def loss(
            hidden: Tensor,
            weight: Tensor,
            *,
            captured: list[Tensor] = captured,
            targets: Tensor,
            **fields: Any,
        ) -> TokenLoss:
            result = linear_token_loss(hidden, weight, targets, LossSpec("nll"), **fields)
            captured.append(result.logprobs)
            return result

        inputs = {name: value.to(device) for name, value in _packed(part, padded).items()}
        model.pipeline.forward_only({**inputs, "normalizer": 1.0, "loss": loss})
        for logprobs in captured:
            chosen = logprobs.float().cpu()[inputs["mask"].cpu()]
            found += chosen.split([len(c.tokens) for c in part])
    return found


def _length(completion: Completion) -> int:
    return len(completion.request.prompt) + len(completion.tokens) - 1


def _passes(completions: Sequence[Completion], most_tokens: int) -> list[list[Completion]]:
    passes: list[list[Completion]] = []
    filled = most_tokens
    for completion in completions:
        length = _length(completion)
        if filled + length > most_tokens:
            passes.append([])
            filled = 0
        passes[-1].append(completion)
        filled += length
    return passes


def _packed(completions: Sequence[Completion], padded: int) -> dict[str, Tensor]:
    """Documents one after another; only what was sampled is looked at."""
    tokens = torch.zeros(padded, dtype=torch.int64)
    targets = torch.zeros(padded, dtype=torch.int64)
    mask = torch.zeros(padded, dtype=torch.bool)
    offsets, begin = [0], 0
    for completion in completions:
        prompt = torch.tensor(list(completion.request.prompt))
        whole = torch.cat((prompt, completion.tokens))
        end = begin + len(whole) - 1
        tokens[begin:end], targets[begin:end] = whole[:-1], whole[1:]
        mask[begin + len(prompt) - 1 : end] = True
        offsets.append(end)
        begin = end
    if begin < padded:
        offsets.append(padded)
    documents = torch.tensor(offsets, dtype=torch.int32)
    return {"tokens": tokens, "targets": targets, "mask": mask, "documents": documents}
