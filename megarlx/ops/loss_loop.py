"""The loop over chunks of rows in Python, for functions and for vocabulary shards.

That of csrc/linear_token_loss.cpp, which has the formulas that the native op has, is the other one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megarlx.ops import beside
from megarlx.ops.beside import Order, Result
from megarlx.ops.loss_seam import Derivatives, RowTerms, add_sums, row_terms
from megarlx.ops.loss_spec import LossSpec
from megarlx.ops.product import product, product_
from megarlx.ops.token_inputs import TokenInputs, precision_of
from megarlx.ops.token_loss import combine_partials_

if TYPE_CHECKING:
    from megarlx.comm.groups import Group


class Products:
    """Hidden rows, the weight and a chunk of logits: the three products.

    Where the gradients by logits of all chunks fit into `kept_gradients_mib`, they are kept, and
    the weight's is one product. `apart`: they do not take the places of their logits.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        rows: int,
        grad_weight: Tensor | None,
        final_cap: float | None,
        mask: Tensor | None = None,
        *,
        kept_gradients_mib: int = 0,
        apart: bool = False,
    ) -> None:
        self.final_cap, self.mask = final_cap, mask
        self.hidden, self.grad_weight = hidden, grad_weight
        self.count, self.rows = len(hidden), rows
        self.precision = precision_of(hidden.dtype)
        narrow = hidden.dtype != self.precision
        self.mixed = narrow and hidden.device.type == "cuda"  # products of bf16 with fp32 results
        self.weight = weight.to(self.precision) if narrow and not self.mixed else weight
        self.grad_hidden = torch.empty_like(hidden)
        self.apart = self.mixed or apart
        kind, back = hidden.dtype if self.mixed else self.precision, grad_weight is not None
        mib = self.count * len(weight) * kind.itemsize / 2**20
        self.keeps = back and self.count > rows and mib <= kept_gradients_mib
        in_turn = min(rows, max(self.count, 1)), len(weight)
        every = (self.count, len(weight)) if self.keeps else in_turn
        self._logits = hidden.new_empty(in_turn if self.apart else every, dtype=self.precision)
        self._gradients = self._logits
        if self.apart and back:
            self._gradients = hidden.new_empty(every, dtype=kind)
        if self.keeps:
            self.hidden, self.mask = self.hidden_of(slice(None)), None

    def chunks(self) -> Iterator[slice]:
        for begin in range(0, self.count, self.rows):
            yield slice(begin, min(begin + self.rows, self.count))

    def hidden_of(self, chunk: slice) -> Tensor:
        found, mask = self.hidden[chunk], self.mask
        if mask is not None:  # their gradient is 0, and 0 times NaN would be NaN in the weight's
            found = found.where(mask[chunk, None], 0)
        return found if self.mixed else found.to(self.precision)

    def logits(self, part: slice, hidden: Tensor) -> Tensor:
        """Of a chunk or a part of one."""
        out = _place(self._logits, part)
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

    def gradient_of(self, part: slice) -> Tensor:
        """Where the gradient by these logits belongs."""
        return _place(self._gradients, part)

    def back(self, chunk: slice, hidden: Tensor) -> None:
        """Adds the chunk's part of the weight's gradient, and sets that of its hidden rows."""
        gradient = self.gradient_of(chunk)
        self.grad_hidden[chunk] = product(gradient, self.weight)
        if not self.keeps:
            self._add(gradient, hidden)

    def finish(self) -> None:
        """Behind all chunks."""
        if self.keeps:
            self._add(self._gradients, self.hidden)

    def _add(self, gradient: Tensor, hidden: Tensor) -> None:
        total = self.grad_weight
        assert total is not None
        if self.mixed:
            torch.addmm(total, gradient.t(), hidden, out_dtype=self.precision, out=total)
        else:
            product_(total, gradient.t(), hidden, add=True)


def _place(rows: Tensor, part: slice) -> Tensor:
    """Where all have a row their own, else in as many as one chunk has."""
    begin = part.start % len(rows)
    return rows[begin : begin + part.stop - part.start]


Work = Callable[[slice, Tensor], Result]  # of a chunk, or a part of one, and its logits


class _Rows:
    """The walk over chunks, around the two ops of the seam."""

    def __init__(
        self,
        weight: Tensor,
        tokens: TokenInputs,
        group: Group | None,
        vocab_size: int,
        products: Products,
        order: Order,
    ) -> None:
        self.tokens, self.group, self.products, self.order = tokens, group, products, order
        self.place = (0 if group is None else group.rank * len(weight), vocab_size)

    @property
    def with_gradient(self) -> bool:
        return self.products.grad_weight is not None

    def walk(self, work: Work[Result], *, back: bool) -> list[Result]:
        """What `work` finds of each part; where it makes the gradient, the walk goes `back`."""
        products, found = self.products, list[Result]()
        under_way, ended = deque[Callable[[], Result]](), list[tuple[slice, Tensor]]()

        def join(left: int = 0) -> None:
            while len(under_way) > left:
                found.append(under_way.popleft()())

        def go_back() -> None:
            join()
            for chunk, hidden in ended:
                if back:
                    products.back(chunk, hidden)
            ended.clear()

        for chunk in products.chunks():
            hidden = products.hidden_of(chunk)
            for part, states in self._parts(chunk, hidden):
                join(left=1)  # the one before that was in this place
                logits = products.logits(part, states)
                if ended:
                    go_back()
                under_way.append(self.order.begin(partial(work, part, logits)))
            ended.append((chunk, hidden))
            if self.order.parts == 1:
                go_back()
        go_back()
        return found

    def _parts(self, chunk: slice, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        begin = chunk.start
        for states in hidden.split(-(-self.products.rows // self.order.parts)):
            yield slice(begin, begin + len(states)), states
            begin += len(states)

    def sums(self, chunk: slice, logits: Tensor) -> Tensor:
        tokens = self.tokens.rows(chunk.start, chunk.stop)
        of_rows = (tokens.targets, tokens.mask, tokens.temperature)
        partials: Tensor = torch.ops.megarlx.token_loss_sums(logits, *of_rows, *self.place)
        return partials

    def make_gradient(
        self, chunk: slice, logits: Tensor, partials: Tensor, derivatives: Derivatives
    ) -> None:
        tokens, products = self.tokens.rows(chunk.start, chunk.stop), self.products
        slope = products.slope_of_cap(logits)
        gradient = products.gradient_of(chunk)
        of_rows = (tokens.targets, tokens.mask, *derivatives, tokens.temperature)
        into = gradient if products.apart else None
        torch.ops.megarlx.token_loss_gradient_(logits, partials, *of_rows, *self.place, into)
        if slope is not None:
            gradient.mul_(slope)


def by_chunks(rows: _Rows, spec: LossSpec) -> list[RowTerms]:
    """Each chunk by itself: three products."""

    def terms_of(chunk: slice, logits: Tensor) -> RowTerms:
        tokens = rows.tokens.rows(chunk.start, chunk.stop)
        partials = combine_partials_(rows.sums(chunk, logits), rows.group)
        terms = row_terms(partials, tokens, spec, with_gradient=rows.with_gradient)
        if rows.with_gradient:
            rows.make_gradient(chunk, logits, partials, terms.derivatives)
        return terms

    return rows.walk(terms_of, back=rows.with_gradient)


def by_sequences(rows: _Rows, spec: LossSpec) -> list[RowTerms]:
    """All chunks together, between two walks over them: four products."""
    parts = rows.walk(rows.sums, back=False)
    partials = combine_partials_(torch.cat(parts, 1), rows.group)
    terms = row_terms(partials, rows.tokens, spec, with_gradient=rows.with_gradient)

    def gradient(chunk: slice, logits: Tensor) -> None:
        of_chunk = Derivatives(*(slope[chunk] for slope in terms.derivatives))
        rows.make_gradient(chunk, logits, partials[:, chunk].contiguous(), of_chunk)

    if rows.with_gradient:
        rows.walk(gradient, back=True)
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
    kept_gradients_mib: int = 0,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """((loss, log-probs, entropy, metrics), this rank's part of grad_hidden).

    The weight's gradient is added to `grad_weight`; without one there are no gradients.
    """
    total, kept = len(hidden), None
    if tokens.mask is not None and drop_masked:
        kept = tokens.mask.nonzero()[:, 0]
        hidden, tokens = hidden.index_select(0, kept), tokens.select(kept)
    several = len(hidden) > rows_per_chunk
    walk = by_sequences if spec.loss.needs_sequence and several else by_chunks
    with beside.order(hidden, rows_per_chunk) as order:
        products = Products(
            *(hidden, weight, rows_per_chunk, grad_weight, final_cap, tokens.mask),
            kept_gradients_mib=kept_gradients_mib,
            apart=order.parts > 1,
        )
        found = walk(_Rows(weight, tokens, group, vocab_size, products, order), spec)
        products.finish()
    sums = hidden.new_zeros(1 + len(spec.metrics), dtype=torch.float64)
    for terms in found:
        sums = add_sums(sums, terms.sums)
    empty = hidden.new_zeros(0, dtype=products.precision)
    logprobs = torch.cat([empty, *(terms.logprobs for terms in found)])
    entropy = torch.cat([empty, *(terms.entropy for terms in found)])
    spread = [logprobs, entropy, products.grad_hidden]
    if kept is not None:
        spread = [x.new_zeros(total, *x.shape[1:]).index_copy_(0, kept, x) for x in spread]
    sums = sums.to(products.precision)
    return (sums[0].clone(), spread[0], spread[1], sums[1:]), spread[2]
