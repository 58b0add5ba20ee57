"""Students with teachers, and their divergence written out with whole matrices of logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megarlx.comm.groups import Group
from megarlx.ops import Head, Teacher

TOKENS, WIDTH = 11, 6


@dataclass
class Case:
    hidden: Tensor
    weight: Tensor
    teachers: list[Teacher]
    vocabulary: int
    final_cap: float | None
    mask: Tensor | None
    temperature: float
    rest: dict[str, Any] = field(default_factory=dict)

    def head(self, group: Group | None = None) -> Head:
        group = group or Group.alone("tp")
        return Head(self.hidden, self.weight, group, self.vocabulary, self.final_cap)


def case(
    *,
    rows: int = 23,
    vocabulary: int = 23,
    shares: tuple[float, ...] = (1.0,),
    masked: bool = False,
    temperature: float = 1.0,
    final_cap: float | None = None,
    rows_per_chunk: int | None = None,
) -> Case:
    """`rows` of the head, of which `vocabulary` are ids and the others padding."""
    generator = torch.manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    mask = torch.arange(TOKENS) % 3 != 1 if masked else None
    rest: dict[str, Any] = {"normalizer": 7.0, "mask": mask, "temperature": temperature}
    return Case(
        random(TOKENS, WIDTH).requires_grad_(),
        random(rows, WIDTH).requires_grad_(),
        [Teacher(random(TOKENS, WIDTH), random(rows, WIDTH), share) for share in shares],
        vocabulary,
        final_cap,
        mask,
        temperature,
        {**rest, "rows_per_chunk": rows_per_chunk},
    )


class Expected(NamedTuple):
    loss: Tensor
    each: Tensor  # [T]
    hidden: Tensor
    weight: Tensor


def textbook(made: Case, kl: str) -> Expected:
    def log_probs(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight[: made.vocabulary].T
        if made.final_cap is not None:
            logits = made.final_cap * torch.tanh(logits / made.final_cap)
        return (logits / made.temperature).log_softmax(-1)

    hidden, weight = (x.detach().clone().requires_grad_() for x in (made.hidden, made.weight))
    p, each = log_probs(hidden, weight), torch.zeros(TOKENS, dtype=torch.float64)
    for one in made.teachers:
        q = log_probs(one.hidden, one.weight)
        first, second = (p, q) if kl == "reverse" else (q, p)
        each = each + one.share * (first.exp() * (first - second)).sum(-1)
    if made.mask is not None:
        each = each * made.mask
    loss = each.sum() / 7.0
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return Expected(loss.detach(), each.detach(), hidden.grad, weight.grad)
