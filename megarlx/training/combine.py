"""How the updates of several objectives become one.

A combination is a function of `module:name`:

    combine(deltas, shares, dot) -> Tensor

`deltas` are this rank's shards [P] of the objectives' updates, in the stage's order; `shares` sum
to one where no objective was left out; `dot(a, b)` is the scalar product over the whole model, each
element once, as an fp64 tensor on the device. With `linear` set on it, it is the weighted sum, and
the trainer sums in the cheapest way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from megarlx.comm.collectives import all_gather_flat_
from megarlx.comm.groups import Group
from megarlx.ops.averaging import replica_average_

Dot = Callable[[Tensor, Tensor], Tensor]
Combination = Callable[[Sequence[Tensor], Sequence[float], Dot], Tensor]


def weighted_sum(deltas: Sequence[Tensor], shares: Sequence[float], dot: Dot) -> Tensor:
    total = deltas[0] * shares[0]
    for delta, share in zip(deltas[1:], shares[1:], strict=True):
        total.add_(delta, alpha=share)
    return total


weighted_sum.linear = True  # type: ignore[attr-defined]


def projection(deltas: Sequence[Tensor], shares: Sequence[float], dot: Dot) -> Tensor:
    """Takes out of each update, in the stage's order, what goes against another's direction.

    Update i begins as δ_i and, for each other j in turn, loses its part along δ_j where its product
    with δ_j is negative; the weighted sum of what is left is applied. All products come from those
    of the δ, so each pair is multiplied once.
    """
    n = len(deltas)
    products = [[dot(deltas[i], deltas[j]) for j in range(i + 1)] for i in range(n)]
    gram = torch.stack(
        [torch.stack([products[max(i, j)][min(i, j)] for j in range(n)]) for i in range(n)]
    )
    # weights[i] are the coefficients of the δ in what is left of update i.
    weights = torch.eye(n, dtype=gram.dtype, device=gram.device)
    for j in range(n):
        along = weights @ gram[:, j]
        against = (along < 0) & (torch.arange(n, device=gram.device) != j)
        lost = torch.where(against, along / gram[j, j], 0.0)
        weights[:, j] -= lost
    given = torch.tensor(shares, dtype=gram.dtype).to(gram.device, non_blocking=True)
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, given @ weights, strict=True):
        total.add_(delta * weight)
    return total


def sign_agreement(deltas: Sequence[Tensor], shares: Sequence[float], dot: Dot) -> Tensor:
    """Of each element the weighted sum of those updates that have its sign."""
    sign = weighted_sum(deltas, shares, dot).sign_()
    total = torch.zeros_like(sign)
    for delta, share in zip(deltas, shares, strict=True):
        total += torch.where(delta.sign() == sign, share * delta, 0.0)
    return total


def is_linear(combine: Combination) -> bool:
    return bool(getattr(combine, "linear", False))


def without_skipped(
    every: Mapping[str, Tensor], found_inf: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Waits for the device: which updates are combined is known on the host."""
    flags = torch.stack(list(found_inf.values()))
    if flags.is_meta:  # a dry run has no numbers
        return dict(every)
    return {
        name: delta
        for (name, delta), skipped in zip(every.items(), flags.cpu().tolist(), strict=True)
        if not skipped
    }


def buffers_of(combine: Combination, objectives: int, *, in_replicas: bool, apart: bool) -> int:
    """Shards that a rank holds for it; `apart`: what is combined lies somewhere already."""
    if is_linear(combine):
        return (1 if apart else 2) if in_replicas else 0
    return objectives if in_replicas or not apart else 0


class Combiner:
    """Applies a combination to the shards of one rank, over replicas where objectives have them.

    Buffers, each of a shard's size, are made once: fresh memory at each step costs more than the
    pass. Where the combination is not linear every replica gets the shards of all objectives and
    computes the same bits.
    """

    def __init__(
        self,
        combine: Combination,
        names: Sequence[str],
        replicas: Group,
        master: Tensor,
        *,
        of_gradients: bool,
        local_steps: bool,
        dot: Dot,
    ) -> None:
        self.combine, self.linear = combine, is_linear(combine)
        self.names, self.replicas = list(names), replicas
        self.in_replicas = replicas.size > 1
        self.dot = dot
        count = buffers_of(
            combine, len(names), in_replicas=self.in_replicas, apart=of_gradients or local_steps
        )
        self.buffers = master.new_zeros(count, master.numel())

    def room(self, name: str) -> Tensor | None:
        """Where an objective's delta may be written, so that no copy is needed."""
        if len(self.buffers) == 0:
            return None
        return self.buffers[1 if self.linear else self.names.index(name)]

    def together(self, mine: Mapping[str, Tensor]) -> list[Tensor]:
        """Shards of all objectives in their order, of which this rank has some."""
        if not self.in_replicas:
            return list(mine.values())
        ((name, own),) = mine.items()
        place = self.buffers[self.names.index(name)]
        if place.data_ptr() != own.data_ptr():
            place.copy_(own)
        all_gather_flat_(self.buffers.view(-1), place, self.replicas).wait()
        return list(self.buffers)

    def combined(self, every: Mapping[str, Tensor], shares: Mapping[str, float]) -> Tensor | None:
        """Of those deltas that are not left out; None where there is none."""
        if len(every) < 2:
            return next((delta * shares[name] for name, delta in every.items()), None)
        return self.checked(list(every.values()), [shares[name] for name in every])

    def checked(self, deltas: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
        result = self.combine(deltas, shares, self.dot)
        like = deltas[0]
        if result.shape != like.shape or result.dtype != like.dtype:
            raise ValueError(
                f"the combination gave {list(result.shape)} {result.dtype} of deltas of "
                f"{list(like.shape)} {like.dtype}; both must be alike"
            )
        return result

    def add_linear_(
        self,
        master: Tensor,
        mine: Mapping[str, Tensor],
        shares: Mapping[str, float],
        found_inf: Tensor,
        out: Tensor | None,
    ) -> None:
        """The weighted sum, with what is skipped left out by `found_inf`, not by its zeros."""
        if self.in_replicas:
            ((name, delta),) = mine.items()
            replica_average_(
                master,
                delta,
                weight=shares[name],
                group=self.replicas,
                packed=self.buffers[0],
                found_inf=found_inf,
                param_out=out,
            )
            return
        for name, delta in mine.items():
            master.add_(delta, alpha=shares[name])

    def mix_linear_(
        self, mine: Mapping[str, Tensor], shares: Mapping[str, float], found_inf: Tensor
    ) -> Tensor:
        """The weighted sum of gradients, in the first one's memory."""
        (first, mixed), *others = mine.items()
        if self.in_replicas:
            replica_average_(
                mixed,
                mixed,
                weight=shares[first],
                group=self.replicas,
                of="gradients",
                packed=self.buffers[0],
                found_inf=found_inf,
            )
        else:
            mixed.mul_(shares[first])
            for name, gradient in others:
                mixed.add_(gradient, alpha=shares[name])
        return mixed
