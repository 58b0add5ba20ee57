"""Bytes that a rank sends in a step of all its objectives, on each axis."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from megarlx.comm.groups import bytes_sent
from megarlx.planning.communication import Sent, objective_bytes, update_bytes
from megarlx.planning.job import Job
from megarlx.training.combine import is_linear
from megarlx.training.update_rules import rule_of
from megarlx.training.whole_tensors import elements_sent, whole_tensors


def bytes_of_step(job: Job, rank: int, *, averages: bool = False) -> Sent:
    """The mean of the steps; with `averages` of one that ends with an average of local steps."""
    total: Sent = Counter()
    for one in job.trained_on(rank):
        sent = objective_bytes(job.model, job.layout, job.plan, one.step_shape, rank)
        times = one.objectives * one.share_of_steps
        total += Counter({key: round(count * times) for key, count in sent.items()})
    step = replace(job.step_shape, averages=1.0) if averages else job.step_shape
    total += update_bytes(job.model, job.layout, job.plan, step, rank)
    return total + rule_bytes(job, rank) + dot_bytes(job, step.averages)


def rule_bytes(job: Job, rank: int) -> Sent:
    """Of whole matrices that update rules see, to where they are computed and back."""
    place = job.layout.coordinates(rank)
    tensor_ranks = [job.layout.rank_at(**{**place, "tp": tp}) for tp in range(job.tp)]
    here = place["dp"] * job.tp + place["tp"]
    sent: Sent = Counter()
    trained = job.trained_on(rank)
    for one in trained[:1] if job.shared_moments else trained:
        layouts = [job.parameter_layouts(other) for other in tensor_ranks]
        wholes = whole_tensors(job.flat_layout(rank), layouts, rule_of(one.update).whole)
        times = 1 if job.shared_moments else one.objectives * one.share_of_steps
        sent["dp+tp", "all_to_all"] += round(elements_sent(wholes, here) * job.wide_bytes * times)
    return sent


def dot_bytes(job: Job, averages: float) -> Sent:
    """Of the products over the whole model that a combination asks for."""
    sent: Sent = Counter()
    if is_linear(job.combine):
        return sent
    dots = dots_of(job)
    for axis, size in (("dp", job.dp), ("tp", job.tp), ("pp", job.pp)):
        one = bytes_sent("all_gather", size, 8 * size)
        sent[axis, "all_gather"] += int(averages * dots * one)
    return sent


def dots_of(job: Job) -> int:
    """How many, from the combination of vectors of one number."""
    asked = 0

    def dot(a: Tensor, b: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        return (a.double() * b.double()).sum()

    count = sum(one.objectives for one in job.all_objectives)
    job.combine([torch.ones(1) for _ in range(count)], [1 / count] * count, dot)
    return asked
