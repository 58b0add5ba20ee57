"""All-gathers samples over the data-parallel group, so that packing can balance them.

Samples are short beside activations: a thousand of a thousand tokens are 40 MB with all fields.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megarlx.comm.collectives import all_gather
from megarlx.comm.groups import Group
from megarlx.rollouts.completions import Completions

OF_SEQUENCES = ("lengths", "truncated")


def gather_ragged(values: Tensor, group: Group) -> Tensor:
    """[n of this rank, …] -> [sum of all n, …] in group order; n may differ and be 0."""
    if group.size == 1:
        return values
    count = torch.tensor([len(values)], device=values.device)
    counts = all_gather(count, group).tolist()
    longest = max(counts)
    padding = [0, 0] * (values.dim() - 1) + [0, longest - len(values)]
    rows = all_gather(F.pad(values, padding), group).unflatten(0, (group.size, longest))
    return torch.cat([row[:n] for row, n in zip(rows, counts, strict=True)])


def gather_completions(mine: Completions, group: Group) -> Completions:
    """The completions of all ranks, in group order. All ranks have the same fields filled."""
    if group.size == 1:
        return mine
    present = [f.name for f in fields(mine) if getattr(mine, f.name) is not None]
    gathered: dict[str, Tensor] = {}
    for names in (
        [name for name in present if name in OF_SEQUENCES],
        [name for name in present if name not in OF_SEQUENCES],
    ):
        # fp64 holds ids, lengths and flags exactly, and fp32 log-probs too: one exchange for all
        table = torch.stack([getattr(mine, name).double() for name in names], dim=1)
        columns = gather_ragged(table, group).unbind(1)
        for name, column in zip(names, columns, strict=True):
            gathered[name] = column.to(getattr(mine, name).dtype)
    return replace(mine, **gathered)
