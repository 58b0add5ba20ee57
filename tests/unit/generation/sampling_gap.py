"""How far the log-probs of sampling are from those of a pass over the whole text, by the formula
that RL logs as rl/logprob_gap."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megarlx.comm.collectives import all_reduce_
from megarlx.generation.requests import Completion
from megarlx.model.build import ParallelModel
from megarlx.model.token_scores import Text, token_scores
from megarlx.objectives.policy_loss import gap_sums


def sampling_gap(
    model: ParallelModel, completions: Sequence[Completion], *, tokens_per_pass: int = 4096
) -> tuple[float, float, float, int]:
    """(mean, maximum, divergence, tokens) over all ranks; data-parallel ranks bring their own."""
    texts = [
        Text(torch.cat((torch.tensor(list(c.request.prompt)), c.tokens)), len(c.request.prompt))
        for c in completions
    ]
    scores = token_scores(model, texts, tokens_per_pass=tokens_per_pass)
    sums, most = torch.zeros(3, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    if model.pipeline.holds_last_stage and completions:
        sampled = torch.cat([c.logprobs for c in completions]).double()
        trained = torch.cat([s.logprobs for s in scores]).double()
        found = gap_sums(sampled, trained, torch.ones_like(sampled, dtype=torch.bool))
        sums = torch.stack([found[key] for key in ("gap", "kl", "tokens")])
        most = found["gap_max"].reshape(1)
    for group in (model.mesh.pp, model.mesh.dp):
        all_reduce_(sums, group)
        all_reduce_(most, group, op="max")
    gap, divergence, tokens = sums.tolist()
    return gap / max(tokens, 1.0), float(most), divergence / max(tokens, 1.0), int(tokens)
