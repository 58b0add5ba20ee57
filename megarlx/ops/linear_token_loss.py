"""The token loss from hidden states and the head weight, a chunk of rows at a time.

The logits of a chunk, `hidden @ weight.T` in fp32, are overwritten by their own gradient, which
gives the chunk's part of both gradients: three products, and never more than a chunk of logits.
A loss that looks at whole sequences is called once for all chunks; where there are several, their
logits are made again for the gradient, a fourth product. The formulas are token_loss's.

There are two loops: csrc/linear_token_loss.cpp for the formulas that the op has, and loss_loop.py
for functions and for vocabulary shards.

Letters: T tokens, d hidden size, V vocabulary (this rank's slice).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megarlx.comm.collectives import all_reduce_
from megarlx.ops.loss_loop import python_loop
from megarlx.ops.loss_spec import LossSpec, TokenLoss, refuse
from megarlx.ops.token_inputs import (
    LossInputs,
    TokenInputs,
    check_floats,
    check_vocab_size,
    precision_of,
    prepare,
)
from megarlx.ops.token_loss import empty_results, scaled, shaped

if TYPE_CHECKING:
    from megarlx.comm.groups import Group

# A chunk of logits is written by one product and read by two more: at this many rows the products
# are at full rate, and what a chunk costs besides (reading and writing the whole weight gradient)
# is small beside them.
CPU_ROWS, CUDA_ROWS = (256, 4096), (256, 4096)  # at least, at most
CPU_LOGITS, CUDA_LOGITS = 1 << 22, 1 << 29  # of a chunk: 16 MiB (half a cache), 2 GiB


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    spec: LossSpec,
    *,
    normalizer: Tensor | float,
    mask: Tensor | None = None,
    advantages: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    token_weights: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    sequence: Tensor | None = None,
    sequences: int = 0,
    temperature: Tensor | float = 1.0,
    group: Group | None = None,
    vocab_size: int | None = None,
    weight_grad_: Tensor | None = None,
    reduce_hidden_grad: bool = True,
    drop_masked: bool = True,
    rows_per_chunk: int | None = None,
    final_cap: float | None = None,
    kept_gradients_mib: int = 0,
) -> TokenLoss:
    """token_loss of the logits `hidden` [..., d] @ `weight` [V, d].T, which never exist whole.

    group               `weight` is this rank's slice of the vocabulary; targets are global ids
    reduce_hidden_grad  sums the gradient of `hidden` over the group. False leaves each rank its
                        part: for a hidden state that came through gather_sequence or
                        copy_to_group, whose backward does the sum
    weight_grad_        an fp32 (fp64) [V, d] buffer to which the gradient of `weight` is added in
                        this very call; autograd then gives `weight` none. Only for a loss whose
                        upstream gradient is 1, and whose backward is sure to follow
    drop_masked         masked rows are left out of the products. On a GPU their number has to be
                        waited for: False computes them, does not wait, and makes no shape that
                        depends on data
    rows_per_chunk      rows of logits that exist at one time
    final_cap           logits z become cap tanh(z / cap) first
    kept_gradients_mib  where the gradients by the logits of all chunks fit into so many MiB, they
                        are kept, and that of `weight` is one product of all rows in place of one
                        that is added for each chunk
    """
    op = "linear_token_loss"
    check_floats(op, "hidden", hidden, 1)
    check_floats(op, "weight", weight, 2)
    size = 1 if group is None else group.size
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        refuse(op, "weight's shape", tuple(weight.shape), f"[V, {hidden.shape[-1]}]")
    if weight.dtype != hidden.dtype:
        refuse(op, "weight's dtype", weight.dtype, f"{hidden.dtype}, hidden's")
    if weight.device != hidden.device:
        refuse(op, "weight's device", weight.device, f"{hidden.device}, hidden's")
    if weight.shape[0] == 0:
        refuse(op, "weight's shape", tuple(weight.shape), "a vocabulary of at least 1")
    vocab_size = check_vocab_size(op, vocab_size, weight.shape[0] * size)
    inputs = LossInputs(
        *(targets, mask, advantages, old_logprobs, ref_logprobs, token_weights),
        *(rollout_logprobs, sequence, sequences),
    )
    shape = hidden.shape[:-1]
    tokens = prepare(
        op, spec, hidden, shape, inputs, normalizer=normalizer, temperature=temperature
    )
    if rows_per_chunk is None:
        rows_per_chunk = default_rows(hidden, weight)
    if not isinstance(rows_per_chunk, int | torch.SymInt) or rows_per_chunk < 1:
        refuse(op, "rows_per_chunk", rows_per_chunk, "an integer >= 1")
    if not isinstance(kept_gradients_mib, int | torch.SymInt) or kept_gradients_mib < 0:
        refuse(op, "kept_gradients_mib", kept_gradients_mib, "an integer >= 0")
    rows = hidden if hidden.dim() == 2 else hidden.reshape(-1, hidden.shape[-1])
    needs_gradient = hidden.requires_grad or weight.requires_grad or weight_grad_ is not None
    with_gradient = torch.is_grad_enabled() and needs_gradient
    if weight_grad_ is not None:
        check_weight_grad(op, weight, weight_grad_)
    whole = group is None or size == 1
    if final_cap is not None and not 0 < final_cap < float("inf"):
        refuse(op, "final_cap", final_cap, "a finite number above 0, or None")
    native = spec.is_native and final_cap is None
    if native and whole and (weight_grad_ is None or not with_gradient):
        result = torch.ops.megarlx.linear_token_loss(
            rows,
            weight,
            *tokens.arguments,
            vocab_size,
            *spec.arguments,
            rows_per_chunk,
            kept_gradients_mib,
            drop_masked,
            with_gradient,
        )[:4]
    else:
        result = _LinearTokenLoss.apply(
            rows,
            weight,
            tokens,
            spec,
            vocab_size,
            rows_per_chunk,
            drop_masked,
            with_gradient,
            None if whole else group,
            weight_grad_,
            reduce_hidden_grad,
            final_cap,
            kept_gradients_mib,
        )
    return shaped(result, targets.shape)


@dataclass(frozen=True)
class Head:
    """What the last stage hands to a loss: its hidden states, and what makes logits of them."""

    hidden: Tensor  # [T, d], entered into `group`: its backward sums the gradient over it
    weight: Tensor  # [V, d]
    group: Group
    vocab_size: int
    final_cap: float | None = None
    weight_grad: Tensor | None = None  # where training adds weight gradients by the product itself
    kept_gradients_mib: int = 0  # as of linear_token_loss
    added: list[Tensor] = field(default_factory=list)  # losses whose gradient was added to it

    def token_loss(
        self,
        inputs: LossInputs,
        spec: LossSpec,
        *,
        normalizer: Tensor | float,
        temperature: Tensor | float = 1.0,
        rows_per_chunk: int | None = None,
        as_it_is: bool = False,
        drop_masked: bool = True,
    ) -> TokenLoss:
        """`as_it_is`: this loss is all that the objective returns, this very tensor, so that the
        weight's gradient may be added now."""

        def flat(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.reshape(-1)

        into = self.weight_grad if as_it_is and torch.is_grad_enabled() else None
        found = linear_token_loss(
            self.hidden,
            self.weight,
            inputs.targets.reshape(-1),
            spec,
            normalizer=normalizer,
            mask=flat(inputs.mask),
            advantages=flat(inputs.advantages),
            old_logprobs=flat(inputs.old_logprobs),
            ref_logprobs=flat(inputs.ref_logprobs),
            token_weights=flat(inputs.token_weights),
            rollout_logprobs=flat(inputs.rollout_logprobs),
            sequence=flat(inputs.sequence),
            sequences=inputs.sequences,
            temperature=temperature,
            group=self.group,
            vocab_size=self.vocab_size,
            reduce_hidden_grad=False,
            rows_per_chunk=rows_per_chunk,
            final_cap=self.final_cap,
            kept_gradients_mib=self.kept_gradients_mib,
            weight_grad_=into,
            drop_masked=drop_masked,
        )
        if into is not None:
            self.added.append(found.loss)
        return found

    def check(self, loss: Tensor) -> Tensor:
        """What an objective returned."""
        if self.added and (len(self.added) > 1 or self.added[0] is not loss):
            raise ValueError(
                "head: the objective returned another loss than the one that it asked for "
                "`as_it_is`; allowed there: that tensor itself. A weight belongs into "
                "token_weights or normalizer"
            )
        return loss


def default_rows(hidden: Tensor, weight: Tensor) -> int:
    return rows_for(weight.shape[0], on_cuda=hidden.device.type == "cuda")


def rows_for(vocabulary: int, *, on_cuda: bool) -> int:
    """Rows of a chunk of logits where nothing else is said; `vocabulary` is this rank's."""
    least, most = CUDA_ROWS if on_cuda else CPU_ROWS
    logits = CUDA_LOGITS if on_cuda else CPU_LOGITS
    return max(least, min(most, logits // vocabulary))


def check_weight_grad(op: str, weight: Tensor, weight_grad_: Tensor) -> None:
    if not isinstance(weight_grad_, Tensor):
        refuse(op, "weight_grad_", f"a {type(weight_grad_).__name__}", "a tensor")
    expected = (weight.shape, precision_of(weight.dtype), weight.device, True)
    given = (
        weight_grad_.shape,
        weight_grad_.dtype,
        weight_grad_.device,
        weight_grad_.is_contiguous(),
    )
    if given != expected:
        names = ("shape", "dtype", "device", "contiguous")
        for name, value, allowed in zip(names, given, expected, strict=True):
            if value != allowed:
                refuse(op, f"weight_grad_'s {name}", value, str(allowed))


class _LinearTokenLoss(torch.autograd.Function):
    """Functions, vocabulary shards, and a weight gradient that is added to a buffer."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        tokens: TokenInputs,
        spec: LossSpec,
        vocab_size: int,
        rows_per_chunk: int,
        drop_masked: bool,
        with_gradient: bool,
        group: Group | None,
        weight_grad_: Tensor | None,
        reduce_hidden_grad: bool,
        final_cap: float | None,
        kept_gradients_mib: int,
    ) -> tuple[Tensor, ...]:
        ctx.accumulated = weight_grad_ is not None
        ctx.weight_dtype = weight.dtype
        if spec.is_native and group is None and final_cap is None:
            *result, grad_hidden = torch.ops.megarlx._linear_token_loss_(
                hidden,
                weight,
                *tokens.arguments,
                vocab_size,
                *spec.arguments,
                rows_per_chunk,
                kept_gradients_mib,
                drop_masked,
                weight_grad_,
            )
        else:
            if with_gradient and weight_grad_ is None:
                weight_grad_ = torch.zeros_like(weight, dtype=precision_of(weight.dtype))
            found, grad_hidden = python_loop(
                hidden,
                weight,
                tokens,
                spec,
                vocab_size,
                rows_per_chunk,
                drop_masked,
                group,
                weight_grad_ if with_gradient else None,
                final_cap,
                kept_gradients_mib,
            )
            result = list(found)
            if group is not None and with_gradient and reduce_hidden_grad:
                all_reduce_(grad_hidden, group)
        if with_gradient:
            saved = (grad_hidden,) if ctx.accumulated else (grad_hidden, weight_grad_)
            ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(*result[1:])
        return tuple(result)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        is_known = type(upstream) is Tensor and upstream.device.type == "cpu"
        if ctx.accumulated and is_known and upstream.item() != 1:
            refuse(
                "linear_token_loss",
                "the upstream gradient",
                upstream.item(),
                "1 where weight_grad_ is given: the weight's gradient was added without it",
            )
        grad_hidden, *of_weight = (scaled(gradient, upstream) for gradient in ctx.saved_tensors)
        grad_weight = of_weight[0].to(ctx.weight_dtype) if of_weight else None
        return (grad_hidden, grad_weight, *[None] * 11)


@torch.library.register_fake("megarlx::linear_token_loss")
def _linear_token_loss_fake(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    with_gradient = arguments[-1]
    gradients = [x.new_empty(x.shape if with_gradient else 0) for x in (hidden, weight)]
    return (*empty_results(hidden, hidden.shape[0]), *gradients)


@torch.library.register_fake("megarlx::_linear_token_loss_")
def _linear_token_loss_accumulate_fake(hidden: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return (*empty_results(hidden, hidden.shape[0]), hidden.new_empty(hidden.shape))
