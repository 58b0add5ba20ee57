"""Sampled sequences in micro-batches of one shape, dealt out over the data-parallel ranks.

Each sequence is a document of its own, so attention sees no other. What a token weighs and what the
loss is divided by are known before (policy_loss.py): packing changes no number, only where it is
computed. A sequence of n tokens takes n - 1 places, since its last token is a target only.

Letters: T tokens of all sequences, N sequences, M micro-batches of a rank, W places in each.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megarlx.objectives.interface import Batch
from megarlx.objectives.policy_loss import PolicyFields
from megarlx.ops import LossInputs, LossSpec
from megarlx.parallel.microbatches import Microbatch
from megarlx.rollouts.completions import Completions

# Widths come in this many steps up to the budget: full micro-batches are not padded by much, and a
# pipeline (or a CUDA graph) meets few different shapes.
WIDTHS = 8


@dataclass(frozen=True)
class Deal:
    """Which sequences each micro-batch of each rank holds. All ranks compute the same one."""

    ranks: tuple[tuple[tuple[int, ...], ...], ...]
    width: int

    @property
    def microbatches(self) -> int:
        return len(self.ranks[0])


def deal(
    lengths: Sequence[int],
    *,
    tokens_per_microbatch: int,
    ranks: int = 1,
    microbatches_multiple: int = 1,
    width_multiple: int = 1,
) -> Deal:
    """As few micro-batches as hold all sequences, each about as full as the others.

    Every rank gets the same number of them, a multiple of `microbatches_multiple` (a pipeline may
    ask for that). The width is a multiple of `width_multiple` (sequence parallelism may).
    """
    if tokens_per_microbatch < 1 or tokens_per_microbatch % width_multiple:
        raise ValueError(
            f"packing: tokens_per_microbatch is {tokens_per_microbatch}; it must be a multiple of "
            f"{width_multiple}, at least {width_multiple}"
        )
    if not lengths:
        raise ValueError("packing: there are no sequences")
    for number, length in enumerate(lengths):
        if not 2 <= length <= tokens_per_microbatch + 1:
            raise ValueError(
                f"packing: sequence {number} has {length} tokens; tokens_per_microbatch = "
                f"{tokens_per_microbatch} allows 2 to {tokens_per_microbatch + 1}"
            )
    places = [length - 1 for length in lengths]
    # placing the longest first on the emptiest bin needs at most a few tries more than this
    count = -(-sum(places) // (tokens_per_microbatch * ranks))
    count = -(-count // microbatches_multiple) * microbatches_multiple
    while (bins := _fill(places, ranks * count, tokens_per_microbatch)) is None:
        count += microbatches_multiple
    loads = [sum(places[i] for i in held) for held in bins]
    order = sorted(range(len(bins)), key=lambda b: (-loads[b], b))
    sorted_bins = [tuple(sorted(bins[b])) for b in order]
    step = -(-tokens_per_microbatch // (WIDTHS * width_multiple)) * width_multiple
    width = min(-(-max(loads) // step) * step, tokens_per_microbatch)
    return Deal(tuple(tuple(sorted_bins[r::ranks]) for r in range(ranks)), width)


def _fill(places: Sequence[int], bins: int, room: int) -> list[list[int]] | None:
    """None if the emptiest bin has no room at some point."""
    held: list[list[int]] = [[] for _ in range(bins)]
    emptiest = [(0, b) for b in range(bins)]
    for item in sorted(range(len(places)), key=lambda i: (-places[i], i)):
        load, b = emptiest[0]
        if load + places[item] > room:
            return None
        heapq.heapreplace(emptiest, (load + places[item], b))
        held[b].append(item)
    return held


@dataclass(frozen=True)
class Layout:
    """Where each token of `Completions` stands in a rank's micro-batches."""

    sequences: Tensor  # int64, all that this rank holds
    source: Tensor  # int64 [M, W], token at this place in [T]; -1: padding
    documents: Tensor  # int32 [M, documents + 1], offsets
    longest: int  # no document has more tokens
    most_sequences: int  # in a micro-batch, on any rank
    tokens: int  # of this rank, without padding
    total: int  # T

    @staticmethod
    def of(
        lengths: Tensor, dealt: Deal, rank: int = 0, device: torch.device | None = None
    ) -> Layout:
        """`lengths` on the host; the layout is on `device`, where that is another one."""
        held = lengths.tolist()
        starts = [0, *lengths.cumsum(0).tolist()]
        longest = max(held) - 1
        rows, offsets = [], []
        for microbatch in dealt.ranks[rank]:
            row: list[int] = []
            ends = [0]
            for i in microbatch:
                row += range(starts[i], starts[i] + held[i] - 1)
                ends.append(len(row))
            # padding is documents too, none longer than a real one
            ends += [*range(len(row) + longest, dealt.width, longest), dealt.width]
            rows.append(row + [-1] * (dealt.width - len(row)))
            offsets.append(ends)
        most = max(map(len, offsets))
        offsets = [ends + [dealt.width] * (most - len(ends)) for ends in offsets]
        mine = [i for microbatch in dealt.ranks[rank] for i in microbatch]

        def sent(values: list[Any], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device or lengths.device, non_blocking=True)

        return Layout(
            sent(mine, torch.int64),
            sent(rows, torch.int64),
            sent(offsets, torch.int32),
            longest,
            max(len(microbatch) for of_rank in dealt.ranks for microbatch in of_rank),
            sum(held[i] - 1 for i in mine),
            starts[-1],
        )

    @property
    def real(self) -> Tensor:
        return self.source >= 0

    @property
    def sequence(self) -> Tensor:
        """int64 [M, W]: which of its micro-batch's sequences a place is of; padding -1."""
        places = torch.arange(self.source.shape[1], dtype=torch.int32, device=self.source.device)
        everywhere = places.expand(self.source.shape).contiguous()
        found = torch.searchsorted(self.documents, everywhere, right=True) - 1
        return found.masked_fill(~self.real, -1)

    def place(self, values: Tensor) -> Tensor:
        """[T], at the token's own place -> [M, W], where that token is the target; padding 0."""
        return values[self.source + 1].masked_fill(~self.real, 0)  # the padding's -1 reads token 0

    def take_back(self, values: Tensor) -> Tensor:
        """[M, W] -> [T], the inverse of `place`; 0 for first tokens and for other ranks' ones."""
        out = values.new_zeros(self.total)
        out[self.source[self.real] + 1] = values[self.real]
        return out

    def microbatches(
        self, completions: Completions, inputs: Mapping[str, Tensor], sequences: int = 0
    ) -> list[Microbatch]:
        """`inputs` are fields of LossInputs [M, W], beside the targets."""
        tokens = completions.tokens[self.source.clamp_min(0)].masked_fill(~self.real, 0)
        targets = self.place(completions.tokens)
        return [
            Microbatch(
                tokens[i : i + 1],
                LossInputs(targets[i], **{k: v[i] for k, v in inputs.items()}, sequences=sequences),
                self.documents[i],
                self.longest,
            )
            for i in range(len(tokens))
        ]


def policy_batch(
    completions: Completions, fields: PolicyFields, layout: Layout, spec: LossSpec
) -> Batch:
    """What one rank trains on; the trainer divides by the sum of the weights of all ranks."""
    names = ["mask", "advantages", "old_logprobs", "ref_logprobs", "token_weights"]
    names += [] if spec.is_native else ["rollout_logprobs"]
    given = {name: getattr(fields, name) for name in names}
    inputs = {name: layout.place(value) for name, value in given.items() if value is not None}
    whole = spec.loss.needs_sequence
    if whole:
        inputs["sequence"] = layout.sequence
    return Batch(
        layout.microbatches(completions, inputs, layout.most_sequences if whole else 0),
        weight=fields.sequence_weights[layout.sequences].sum(),
        tokens=layout.tokens,
    )
