"""AdamW of n objectives from one snapshot, and its exchange between replicas.

Every objective makes its own AdamW update of the same snapshot with its own moments; the weighted
sum of the updates is applied:

    Δ_i = -lr_i · weight_decay_i · θ̄ - lr_i · (m_i / (1 - β1^t)) / (sqrt(v_i / (1 - β2^t)) + ε)
    θ   = θ̄ + Σ_i weight_i · Δ_i

`average_adamw_` does that where one rank holds all objectives; `adamw_update_` and
`replica_average_` do it where each objective has ranks of its own. Numbers of an objective (lrs,
weight_decays, clips, weights) may be tensors on the device, so that no step waits for the host; in
a captured CUDA graph they have to be. They are read as float64, whatever the buffers' dtype.

An objective whose `found_inf` is set is skipped: moments, step and update stay untouched, and its
update is left out of the sum, never multiplied by zero. The other weights are not raised to make up
for it: the paper's ½ stays ½, and a step in which one objective overflowed is a smaller step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from megarlx.comm.collectives import all_reduce_
from megarlx.comm.groups import Group
from megarlx.ops import native

native.load()

MAX_OBJECTIVES = 8
Numbers = float | Sequence[float] | Tensor
Betas = tuple[float, float] | Sequence[tuple[float, float]]


def _refuse(op: str, name: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"megarlx.{op}: {name} is {value}; allowed: {allowed}")


def _numbers(op: str, name: str, values: Numbers, n: int, like: Tensor, least: float) -> Tensor:
    """One float64 an objective on the device of `like`, without waiting for the device."""
    if isinstance(values, Tensor):
        if values.shape not in ((n,), ()) or not values.is_floating_point():
            given = f"{values.dtype} {list(values.shape)}"
            raise _refuse(op, name, given, f"floating point of shape [{n}], one an objective")
        return values.to(torch.float64).expand(n).contiguous()
    if isinstance(values, (int, float)):
        values = [float(values)] * n
    if len(values) != n:
        raise _refuse(op, f"the number of {name}", len(values), f"{n}, one an objective")
    for value in values:
        if not (math.isfinite(value) and value >= least):
            raise _refuse(op, name, value, "finite" + (f", >= {least}" if least == 0 else ""))
    if like.device.type == "cpu":
        return torch.tensor(values, dtype=torch.float64)
    if len(set(values)) == 1:
        return torch.full((n,), values[0], dtype=torch.float64, device=like.device)
    host = torch.tensor(values, dtype=torch.float64, pin_memory=like.device.type == "cuda")
    return host.to(like.device, non_blocking=True)


def _flags(found_inf: Tensor | None) -> Tensor | None:
    """Any number type: what is not 0 (NaN too) means skip."""
    if found_inf is None or found_inf.dtype == torch.bool:
        return found_inf
    return found_inf != 0


def _each(op: str, name: str, value: float | Sequence[float], n: int) -> list[float]:
    values = [float(value)] * n if isinstance(value, (int, float)) else [float(v) for v in value]
    if len(values) != n:
        raise _refuse(op, f"the number of {name}", len(values), f"1 or {n}, one an objective")
    return values


def _pairs(op: str, betas: Betas, n: int) -> tuple[list[float], list[float]]:
    one_pair = len(betas) == 2 and all(isinstance(b, (int, float)) for b in betas)
    pairs: list[Any] = [betas] * n if one_pair else list(betas)
    if len(pairs) != n or any(isinstance(p, (int, float)) or len(p) != 2 for p in pairs):
        raise _refuse(op, "betas", betas, f"a pair, or {n} pairs, one an objective")
    return [float(p[0]) for p in pairs], [float(p[1]) for p in pairs]


@torch.no_grad()
def average_adamw_(
    master: Tensor,
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lrs: Numbers,
    betas: Betas = (0.9, 0.95),
    eps: float | Sequence[float] = 1e-8,
    weight_decays: Numbers = 0.0,
    steps: Tensor,
    clips: Numbers = 1.0,
    weights: Numbers,
    found_inf: Tensor | None = None,
    param_out: Tensor | None = None,
) -> None:
    """One pass over flat buffers: every objective's AdamW, and the weighted sum of the updates.

    master [P] float32 or float64 is the snapshot and gets the new weights; grads n × [P] in its
    dtype or bfloat16; moments n × [P] in its dtype, updated in place. steps int64 [n] counts
    finished steps and is advanced here. clips are multiplied into the gradients. param_out [P] gets
    a copy of the new weights, rounded to nearest even where it is bfloat16.
    """
    op, n = "average_adamw_", len(grads)
    if not 1 <= n <= MAX_OBJECTIVES:
        raise _refuse(op, "the number of grads", n, f"1 to {MAX_OBJECTIVES}")
    beta1s, beta2s = _pairs(op, betas, n)
    torch.ops.megarlx.average_adamw_(
        master,
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        lrs=_numbers(op, "lrs", lrs, n, master, 0),
        beta1s=beta1s,
        beta2s=beta2s,
        eps=_each(op, "eps", eps, n),
        weight_decays=_numbers(op, "weight_decays", weight_decays, n, master, 0),
        steps=steps,
        clips=_numbers(op, "clips", clips, n, master, 0),
        weights=_numbers(op, "weights", weights, n, master, -math.inf),
        found_inf=_flags(found_inf),
        param_out=param_out,
    )


@torch.no_grad()
def adamw_update_(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float | Tensor = 0.0,
    steps: Tensor,
    clip: float | Tensor = 1.0,
    found_inf: Tensor | None = None,
    delta: Tensor | None = None,
) -> Tensor:
    """One objective's AdamW without its last line: returns Δ (in `delta`), leaves the master.

    steps and found_inf have shape [1]. The Δ of a skipped step is 0.
    """
    op = "adamw_update_"
    delta = torch.empty_like(master) if delta is None else delta
    beta1s, beta2s = _pairs(op, betas, 1)
    torch.ops.megarlx.adamw_update_(
        master,
        grad,
        exp_avg,
        exp_avg_sq,
        lr=_numbers(op, "lr", lr, 1, master, 0),
        beta1=beta1s[0],
        beta2=beta2s[0],
        eps=float(eps),
        weight_decay=_numbers(op, "weight_decay", weight_decay, 1, master, 0),
        steps=steps,
        clip=_numbers(op, "clip", clip, 1, master, 0),
        found_inf=_flags(found_inf),
        delta=delta,
    )
    return delta


class ReplicaAverage(NamedTuple):
    squared_norm: Tensor
    """float64 [1]: of this replica's shard of its contribution, before the weight"""
    found_inf: Tensor
    """bool [1]: this replica's contribution was left out"""


@torch.no_grad()
def replica_average_(
    target: Tensor,
    contribution: Tensor,
    *,
    weight: float | Tensor,
    group: Group,
    of: Literal["updates", "gradients"] = "updates",
    wire: torch.dtype | None = None,
    packed: Tensor | None = None,
    found_inf: Tensor | None = None,
    shards: Group | None = None,
    param_out: Tensor | None = None,
) -> ReplicaAverage:
    """Adds up weight · contribution over the replicas of `group`, every rank its own shard.

    of="updates": target (the master shard) += the sum, and param_out gets a copy of it.
    of="gradients": target = the sum, for one shared AdamW.
    wire: the dtype that is sent, the contribution's (default) or bfloat16; packed: a buffer of that
    dtype to be used again at every step, as fresh memory costs more than the pass.

    found_inf [1] says whether this replica's contribution is to be left out; it must then be the
    same on all ranks of the replica. Without it the op looks for itself, and asks the replica's
    other shards over the group `shards` (the mesh's `objective`).
    """
    op = "replica_average_"
    if of not in ("updates", "gradients"):
        raise _refuse(op, "of", repr(of), "'updates', 'gradients'")
    wire = contribution.dtype if wire is None else wire
    packed = torch.empty_like(contribution, dtype=wire) if packed is None else packed
    if packed.dtype != wire:
        raise _refuse(op, "packed.dtype", packed.dtype, f"{wire}, which is sent")
    squared_norm, skipped = torch.ops.megarlx.replica_average_pack(
        contribution,
        _numbers(op, "weight", weight, 1, contribution, -math.inf),
        _flags(found_inf),
        packed,
    )
    if found_inf is None:
        # The flag is known only after the pass that packs; a sum with NaN in it cannot be undone.
        anywhere = skipped.to(torch.int32)
        if shards is not None:
            all_reduce_(anywhere, shards, op="max")
        skipped = anywhere != 0
        torch.ops.megarlx.replica_average_skip_(packed, skipped)
    all_reduce_(packed, group)
    torch.ops.megarlx.replica_average_apply_(target, packed, of == "updates", param_out)
    return ReplicaAverage(squared_norm, skipped)


def _writes_only(op: str) -> Callable[..., None]:
    """The fake kernel of an op that only writes into its arguments."""

    def fake(*args: object, **kwargs: object) -> None:
        devices = {t.device for value in (*args, *kwargs.values()) for t in _tensors_in(value)}
        if len(devices) > 1:
            raise _refuse(op, "device", sorted(map(str, devices)), "one device for all tensors")

    return fake


def _tensors_in(value: object) -> list[Tensor]:
    values = value if isinstance(value, list | tuple) else [value]
    return [one for one in values if isinstance(one, Tensor)]


def _pack_fake(
    input: Tensor, weight: Tensor, found_inf: Tensor | None, packed: Tensor
) -> tuple[Tensor, Tensor]:
    return input.new_empty(1, dtype=torch.float64), input.new_empty(1, dtype=torch.bool)


for _op in ("average_adamw_", "adamw_update_", "replica_average_skip_", "replica_average_apply_"):
    torch.library.register_fake(f"megarlx::{_op}", _writes_only(_op))
torch.library.register_fake("megarlx::replica_average_pack", _pack_fake)


@torch.no_grad()
def average_adamw_reference_(
    master: Tensor,
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lrs: Numbers,
    betas: Betas = (0.9, 0.95),
    eps: float | Sequence[float] = 1e-8,
    weight_decays: Numbers = 0.0,
    steps: Tensor,
    clips: Numbers = 1.0,
    weights: Numbers,
    found_inf: Tensor | None = None,
    param_out: Tensor | None = None,
) -> None:
    """The same in plain torch, an operation a line: for reading, and for comparing with."""
    op, n = "average_adamw_reference_", len(grads)
    beta1s, beta2s = _pairs(op, betas, n)
    epsilons = _each(op, "eps", eps, n)
    lr, decay, clip, weight = (
        _numbers(op, name, values, n, master, -math.inf).to(master.dtype)
        for name, values in (
            ("lrs", lrs),
            ("weight_decays", weight_decays),
            ("clips", clips),
            ("weights", weights),
        )
    )
    skipped = torch.zeros_like(steps, dtype=torch.bool) if found_inf is None else found_inf != 0
    steps += ~skipped
    total = torch.zeros_like(master)
    for i in range(n):
        grad = clip[i] * grads[i].to(master.dtype)
        exp_avg = beta1s[i] * exp_avgs[i] + (1 - beta1s[i]) * grad
        exp_avg_sq = beta2s[i] * exp_avg_sqs[i] + (1 - beta2s[i]) * grad * grad
        step = steps[i].to(torch.float64)
        unbiased = exp_avg / (1 - beta1s[i] ** step).to(master.dtype)
        unbiased_sq = exp_avg_sq / (1 - beta2s[i] ** step).to(master.dtype)
        delta = -lr[i] * (decay[i] * master + unbiased / (unbiased_sq.sqrt() + epsilons[i]))
        exp_avgs[i].copy_(torch.where(skipped[i], exp_avgs[i], exp_avg))
        exp_avg_sqs[i].copy_(torch.where(skipped[i], exp_avg_sqs[i], exp_avg_sq))
        total += torch.where(skipped[i], 0, weight[i] * delta)
    master += total
    if param_out is not None:
        param_out.copy_(master)
