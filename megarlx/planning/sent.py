"""Bytes that a rank sends in a step of all its objectives, on each axis."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from megarlx.model.communication import Sent, objective_bytes, update_bytes
from megarlx.planning.job import Job


def bytes_of_step(job: Job, rank: int, *, averages: bool = False) -> Sent:
    """The mean of the steps; with `averages` of one that ends with an average of local steps."""
    total: Sent = Counter()
    for one in job.trained_on(rank):
        sent = objective_bytes(job.model, job.layout, job.plan, one.step_shape, rank)
        times = one.objectives * one.share_of_steps
        total += Counter({key: round(count * times) for key, count in sent.items()})
    step = replace(job.step_shape, averages=1.0) if averages else job.step_shape
    return total + update_bytes(job.model, job.layout, job.plan, step, rank)
