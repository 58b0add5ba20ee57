"""Log-probs of sampled sequences as training computes them, without gradients, on any layout."""

from __future__ import annotations

import torch
from torch import Tensor

from megarlx.comm.collectives import all_reduce_
from megarlx.comm.groups import Group
from megarlx.model.build import ParallelModel
from megarlx.objectives.packing import Layout, deal
from megarlx.ops import Head, LossInputs, LossSpec, TokenLoss
from megarlx.rollouts.completions import Completions


def layout_for(
    model: ParallelModel, completions: Completions, tokens_per_microbatch: int, group: Group
) -> Layout:
    """This rank's micro-batches of completions that all ranks of `group` hold."""
    mesh = model.mesh
    split = mesh.tp.size if any(stage.sequence_parallel for stage in model.stages) else 1
    lengths = completions.lengths.cpu()
    dealt = deal(
        lengths.tolist(),
        tokens_per_microbatch=max(-(-tokens_per_microbatch // split) * split, split),
        ranks=group.size,
        microbatches_multiple=mesh.pp.size,
        width_multiple=split,
    )
    return Layout.of(lengths, dealt, group.rank, completions.lengths.device)


def training_logprobs(
    model: ParallelModel,
    completions: Completions,
    *,
    temperature: float,
    tokens_per_microbatch: int,
    group: Group,
) -> Tensor:
    """[T], at each written token's own place, 0 elsewhere; the same on every rank of `group`."""
    layout = layout_for(model, completions, tokens_per_microbatch, group)
    captured: list[Tensor] = []

    def loss(head: Head, inputs: LossInputs) -> TokenLoss:
        spec = LossSpec("nll")
        result = head.token_loss(inputs, spec, normalizer=1.0, temperature=temperature)
        captured.append(result.logprobs)
        return result

    written = {"mask": layout.place(completions.written)}
    model.pipeline.forward_only(layout.microbatches(completions, written), loss)
    found = torch.zeros(layout.total, dtype=torch.float64, device=layout.source.device)
    if captured:
        found = layout.take_back(torch.stack(captured).reshape(layout.source.shape).double())
    # Every token was computed by one rank of the group, on the last pipeline stage.
    all_reduce_(all_reduce_(found, group), model.mesh.pp)
    dtype = torch.float64 if model.pipeline.dtype == torch.float64 else torch.float32
    return found.to(dtype)
