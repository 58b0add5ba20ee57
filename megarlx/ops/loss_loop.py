"""The loop over chunks of rows in Python, for functions and for vocabulary shards.

That of csrc/linear_token_loss.cpp, which has the formulas that the native op has, is the other one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megarlx.ops.loss_seam import Derivatives, RowTerms, add_sums, row_terms
from megarlx.ops.loss_spec import LossSpec
from megarlx.ops.product import product, product_
from megarlx.ops.token_inputs import TokenInputs, precision_of
from megarlx.ops.token_loss import combine_partials_

if TYPE_CHECKING:
    from megarlx.comm.groups import Group


class Products:
    """Hidden rows, the weight and a buffer of a chunk's logits: the three products."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        rows: int,
        grad_weight: Tensor | None,
        final_cap: float | None,
        mask: Tensor | None = None,
    ) -> None:
        self.final_cap, self.mask = final_cap, mask
        self.hidden, self.grad_weight = hidden, grad_weight
        self.count, self.rows = len(hidden), rows
        self.precision = precision_of(hidden.dtype)
        narrow = hidden.dtype != self.precision
        self.mixed = narrow and hidden.device.type == "cuda"  # products of bf16 with fp32 results
        self.weight = weight.to(self.precision) if narrow and not self.mixed else weight
        most = min(rows, max(self.count, 1))
        self.buffer = hidden.new_empty(most, len(weight), dtype=self.precision)
        self.narrow = torch.empty_like(self.buffer, dtype=hidden.dtype) if self.mixed else None
        self.grad_hidden = torch.empty_like(hidden)

    def chunks(self) -> Iterator[slice]:
        for begin in range(0, self.count, self.rows):
            yield slice(begin, min(begin + self.rows, self.count))

    def hidden_of(self, chunk: slice) -> Tensor:
        found, mask = self.hidden[chunk], self.mask
        if mask is not None:  # their gradient is 0, and 0 times NaN would be NaN in the weight's
            found = found.where(mask[chunk, None], 0)
        return found if self.mixed else found.to(self.precision)

    def logits(self, hidden: Tensor) -> Tensor:
        out = self.buffer[: len(hidden)]
        if self.mixed:
            torch.mm(hidden, self.weight.t(), out_dtype=self.precision, out=out)
        else:
            product_(out, hidden, self.weight.t())
        if self.final_cap is not None:
            out.div_(self.final_cap).tanh_().mul_(self.final_cap)
        return out

    def slope_of_cap(self, logits: Tensor) -> Tensor | None:
        """What a gradient of capped logits is multiplied by; known before it overwrites them."""
        if self.final_cap is None:
            return None
        return (logits / self.final_cap).square_().neg_().add_(1)

    def back(self, chunk: slice, hidden: Tensor, gradient: Tensor, slope: Tensor | None) -> None:
        """Adds the chunk's part of the weight's gradient, and sets that of its hidden rows."""
        if slope is not None:
            gradient.mul_(slope)
        if self.mixed:
            gradient = gradient.to(self.hidden.dtype)
        self.grad_hidden[chunk] = product(gradient, self.weight)
        total = self.grad_weight
        assert total is not None
        if self.mixed:
            torch.addmm(total, gradient.t(), hidden, out_dtype=self.precision, out=total)
        else:
            product_(total, gradient.t(), hidden, add=True)


class _Rows(Products):
    """Products around the two ops of the seam."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        tokens: TokenInputs,
        group: Group | None,
        vocab_size: int,
        rows: int,
        grad_weight: Tensor | None,
        final_cap: float | None,
    ) -> None:
        super().__init__(hidden, weight, rows, grad_weight, final_cap, tokens.mask)
        self.tokens, self.group = tokens, group
        self.place = (0 if group is None else group.rank * len(weight), vocab_size)

    def sums(self, logits: Tensor, tokens: TokenInputs) -> Tensor:
        of_rows = (tokens.targets, tokens.mask, tokens.temperature)
        partials: Tensor = torch.ops.megarlx.token_loss_sums(logits, *of_rows, *self.place)
        return partials

    def go_back(
        self,
        chunk: slice,
        hidden: Tensor,
        logits: Tensor,
        partials: Tensor,
        derivatives: Derivatives,
    ) -> None:
        tokens = self.tokens.rows(chunk.start, chunk.stop)
        into = None if self.narrow is None else self.narrow[: len(hidden)]
        slope = self.slope_of_cap(logits)
        of_rows = (tokens.targets, tokens.mask, *derivatives, tokens.temperature)
        torch.ops.megarlx.token_loss_gradient_(logits, partials, *of_rows, *self.place, into)
        self.back(chunk, hidden, logits if into is None else into, slope)


def by_chunks(rows: _Rows, spec: LossSpec) -> list[RowTerms]:
    """Each chunk by itself: three products."""
    found = []
    for chunk in rows.chunks():
        hidden, tokens = rows.hidden_of(chunk), rows.tokens.rows(chunk.start, chunk.stop)
        logits = rows.logits(hidden)
        partials = combine_partials_(rows.sums(logits, tokens), rows.group)
        with_gradient = rows.grad_weight is not None
        terms = row_terms(partials, tokens, spec, with_gradient=with_gradient)
        if with_gradient:
            rows.go_back(chunk, hidden, logits, partials, terms.derivatives)
        found.append(terms)
    return found


def by_sequences(rows: _Rows, spec: LossSpec) -> list[RowTerms]:
    """All chunks together, between two walks over them: four products."""
    parts = [
        rows.sums(rows.logits(rows.hidden_of(chunk)), rows.tokens.rows(chunk.start, chunk.stop))
        for chunk in rows.chunks()
    ]
    partials = combine_partials_(torch.cat(parts, 1), rows.group)
    with_gradient = rows.grad_weight is not None
    terms = row_terms(partials, rows.tokens, spec, with_gradient=with_gradient)
    if with_gradient:
        for chunk in rows.chunks():
            hidden = rows.hidden_of(chunk)
            of_chunk = Derivatives(*(slope[chunk] for slope in terms.derivatives))
            in_chunk = partials[:, chunk].contiguous()
            rows.go_back(chunk, hidden, rows.logits(hidden), in_chunk, of_chunk)
    return [terms]


def python_loop(
    hidden: Tensor,
    weight: Tensor,
    tokens: TokenInputs,
    spec: LossSpec,
    vocab_size: int,
    rows_per_chunk: int,
    drop_masked: bool,
    group: Group | None,
    grad_weight: Tensor | None,
    final_cap: float | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """((loss, log-probs, entropy, metrics), this rank's part of grad_hidden).

    The weight's gradient is added to `grad_weight`; without one there are no gradients.
    """
    total, kept = len(hidden), None
    if tokens.mask is not None and drop_masked:
        kept = tokens.mask.nonzero()[:, 0]
        hidden, tokens = hidden.index_select(0, kept), tokens.select(kept)
    rows = _Rows(hidden, weight, tokens, group, vocab_size, rows_per_chunk, grad_weight, final_cap)
    walk = by_sequences if spec.loss.needs_sequence and rows.count > rows.rows else by_chunks
    found = walk(rows, spec)
    sums = hidden.new_zeros(1 + len(spec.metrics), dtype=torch.float64)
    for terms in found:
        sums = add_sums(sums, terms.sums)
    empty = hidden.new_zeros(0, dtype=rows.precision)
    logprobs = torch.cat([empty, *(terms.logprobs for terms in found)])
    entropy = torch.cat([empty, *(terms.entropy for terms in found)])
    spread = [logprobs, entropy, rows.grad_hidden]
    if kept is not None:
        spread = [x.new_zeros(total, *x.shape[1:]).index_copy_(0, kept, x) for x in spread]
    sums = sums.to(rows.precision)
    return (sums[0].clone(), spread[0], spread[1], sums[1:]), spread[2]
