"""The divergence between a model's whole distribution and those of frozen teachers, in chunks.

With p of the student, q_k of teacher k, weights w_k that sum to 1, all at one temperature τ:

    reverse   Σ_k w_k KL(p ‖ q_k),   by the logits p (log p - Σ_k w_k log q_k - itself) / τ
    forward   Σ_k w_k KL(q_k ‖ p),   by the logits (p - Σ_k w_k q_k) / τ

A chunk of the student's logits is made, beside it one of each teacher's in turn, and the student's
becomes its own gradient: three products of the student's head and one of each teacher's, and never
more than a few chunks of logits. A row over shards costs two reductions for each distribution, and
one for the sums.

Letters: T tokens, n tokens of a chunk, d hidden size, V vocabulary (this rank's slice).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megarlx.comm.collectives import all_reduce_
from megarlx.ops.linear_token_loss import Head, default_rows
from megarlx.ops.loss_loop import Products
from megarlx.ops.loss_spec import TokenLoss, refuse
from megarlx.ops.token_inputs import precision_of
from megarlx.ops.token_loss import scaled

if TYPE_CHECKING:
    from megarlx.comm.groups import Group

DISTILL_METRICS = ("tokens", "kl", "entropy")  # sums over the tokens that count


@dataclass(frozen=True)
class Teacher:
    hidden: Tensor  # [T, d], normalised states of the last stage
    weight: Tensor  # [V, d], of its head
    share: float  # of the loss; all shares sum to 1


@dataclass(frozen=True)
class _Job:
    """What the loss is computed of, beside what it is differentiated by."""

    teachers: tuple[Teacher, ...]
    reverse: bool
    mask: Tensor | None  # bool [T]
    scale: Tensor  # 0-dim, what each token's divergence is multiplied by
    temperature: float
    group: Group | None
    vocab_size: int
    rows: int
    kept_gradients_mib: int
    final_cap: float | None
    with_gradient: bool


def linear_distill_loss(
    head: Head,
    teachers: Sequence[Teacher],
    *,
    kl: str,
    normalizer: Tensor | float,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    rows_per_chunk: int | None = None,
) -> TokenLoss:
    """The sum over unmasked tokens of their divergence, over `normalizer` (0 gives 0).

    `logprobs` of the result are the divergences [T], `metrics` the sums of DISTILL_METRICS. The
    gradient of `head.hidden` is this rank's part, as in Head.token_loss.
    """
    op = "linear_distill_loss"
    if kl not in ("reverse", "forward"):
        refuse(op, "kl", repr(kl), "reverse, forward")
    if not 0 < temperature < float("inf"):
        refuse(op, "temperature", temperature, "a number > 0")
    if not teachers or abs(sum(one.share for one in teachers) - 1) > 1e-9:
        shares = [one.share for one in teachers]
        refuse(op, "the teachers' shares", shares, "numbers that sum to 1")
    for one in teachers:
        for name, theirs, ours in (
            ("hidden", one.hidden, head.hidden),
            ("weight", one.weight, head.weight),
        ):
            if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
                given = f"{list(theirs.shape)} {theirs.dtype}"
                refuse(op, f"a teacher's {name}", given, f"{list(ours.shape)} {ours.dtype}")
    precision = precision_of(head.hidden.dtype)
    divisor = torch.as_tensor(normalizer, dtype=precision, device=head.hidden.device).reshape(())
    job = _Job(
        tuple(teachers),
        kl == "reverse",
        None if mask is None else mask.reshape(-1),
        torch.where(divisor == 0, 0, 1 / divisor),
        temperature,
        head.group if head.group.size > 1 else None,
        head.vocab_size,
        rows_per_chunk or default_rows(head.hidden, head.weight),
        head.kept_gradients_mib,
        head.final_cap,
        torch.is_grad_enabled() and (head.hidden.requires_grad or head.weight.requires_grad),
    )
    found: tuple[Tensor, ...] = _Distill.apply(head.hidden, head.weight, job)
    return TokenLoss(*found)


class _Rows:
    """A chunk's log-probs over shards, each distribution in a buffer of its own."""

    def __init__(self, job: _Job, like: Tensor) -> None:
        self.job = job
        place = 0 if job.group is None else job.group.rank * len(like)
        self.real = min(max(job.vocab_size - place, 0), len(like))  # padding ids have no logit

    def log_softmax_(self, logits: Tensor) -> Tensor:
        """[n, real], in place; the normaliser is that of all shards."""
        z = logits[:, : self.real].div_(self.job.temperature)
        top = z.amax(1) if self.real else z.new_full((len(z),), -torch.inf)
        top = self._reduced(top, "max")
        z.sub_(top[:, None])
        total = self._reduced(z.exp().sum(1), "sum")
        return z.sub_(total.log_()[:, None])

    def _reduced(self, values: Tensor, op: str) -> Tensor:
        group = self.job.group
        return values if group is None else all_reduce_(values, group, op)

    def terms(
        self, student: Tensor, teachers: Sequence[Products], chunk: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(divergence [n], entropy [n], derivative by the logits [n, real] in place of `student`),
        of log-probs [n, real]."""
        job, p = self.job, student.exp()
        mixed, own = torch.zeros_like(student), student.new_zeros(len(student))
        for one, products in zip(job.teachers, teachers, strict=True):
            log_q = self.log_softmax_(products.logits(chunk, products.hidden_of(chunk)))
            if job.reverse:
                mixed.add_(log_q, alpha=one.share)
            else:
                q = log_q.exp()
                own += one.share * (q * log_q).sum(1)
                mixed.add_(q, alpha=one.share)
        entropy = -(p * student).sum(1)
        cross = (p * mixed).sum(1) if job.reverse else (mixed * student).sum(1)
        sums = self._reduced(torch.stack((entropy, cross, own)), "sum")
        entropy, cross, own = sums.unbind()
        if job.reverse:
            kl = -entropy - cross
            student.sub_(mixed).sub_(kl[:, None]).mul_(p)
        else:
            kl = own - cross
            torch.sub(p, mixed, out=student)
        return kl, entropy, student.mul_(job.scale / job.temperature)


def _loop(
    hidden: Tensor, weight: Tensor, job: _Job, grad_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(divergences [T], entropies [T], their sums fp64, this rank's part of grad_hidden)."""
    total, kept = len(hidden), None
    states = [one.hidden for one in job.teachers]
    if job.mask is not None:
        kept = job.mask.nonzero()[:, 0]
        hidden, *states = (one.index_select(0, kept) for one in (hidden, *states))
    of_head = (hidden, weight, job.rows, grad_weight, job.final_cap)
    walk = Products(*of_head, kept_gradients_mib=job.kept_gradients_mib)
    rows = _Rows(job, weight)
    theirs = [
        Products(one, teacher.weight, job.rows, None, job.final_cap)
        for one, teacher in zip(states, job.teachers, strict=True)
    ]
    kls, entropies = [hidden.new_zeros(0, dtype=walk.precision)], []
    for chunk in walk.chunks():
        mine = walk.hidden_of(chunk)
        logits = walk.logits(chunk, mine)
        slope = walk.slope_of_cap(logits) if grad_weight is not None else None
        log_p = rows.log_softmax_(logits)
        kl, entropy, _ = rows.terms(log_p, theirs, chunk)
        if grad_weight is not None:
            logits[:, rows.real :] = 0
            if slope is not None:
                logits.mul_(slope)
            if walk.apart:
                walk.gradient_of(chunk).copy_(logits)
            walk.back(chunk, mine)
        kls.append(kl)
        entropies.append(entropy)
    walk.finish()
    kl, entropy = torch.cat(kls), torch.cat([kls[0], *entropies])
    sums = torch.stack((torch.full_like(kl, 1), kl, entropy)).sum(1, dtype=torch.float64)
    spread = [kl, entropy, walk.grad_hidden]
    if kept is not None:
        spread = [x.new_zeros(total, *x.shape[1:]).index_copy_(0, kept, x) for x in spread]
    return spread[0], spread[1], sums, spread[2]


class _Distill(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, job: _Job) -> tuple[Tensor, ...]:
        precision = precision_of(weight.dtype)
        grad_weight = torch.zeros_like(weight, dtype=precision) if job.with_gradient else None
        kl, entropy, sums, grad_hidden = _loop(hidden, weight, job, grad_weight)
        if grad_weight is not None:
            ctx.weight_dtype = weight.dtype
            ctx.save_for_backward(grad_hidden, grad_weight)
        loss = sums[1].to(precision) * job.scale
        ctx.mark_non_differentiable(kl, entropy, sums)
        return loss, kl, entropy, sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = (scaled(one, upstream) for one in ctx.saved_tensors)
        return grad_hidden, grad_weight.to(ctx.weight_dtype), None
