"""The memory of a rank as torch's CPU allocator has it: what the formulas are checked against.

torch's profiler reports every allocation and release, those inside C++ ops too. Python's own
memory, libraries and what a product packs for itself are not torch's tensors and not in it.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from megarlx.planning.dry_run import build, fake_world, trainer_of
from megarlx.planning.job import Job


@dataclass(frozen=True)
class Measured:
    """Bytes that torch had allocated at once on one rank."""

    persistent: int  # between steps
    peak: int  # in a step


def measure(job: Job, rank: int = 0) -> Measured:
    """Builds a rank on the CPU and takes two steps; its peers are not there, so its numbers are
    meaningless, but not their sizes."""
    if job.on_gpu:
        raise ValueError("measure: the job is planned for a GPU; allowed: a job with on_gpu=False")
    device = torch.device("cpu")
    gc.collect()  # what an earlier measurement left in cycles must not be released in this one
    with fake_world(rank, job.gpus):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            trainer = trainer_of(job, build(job, device), device)
            with torch.profiler.record_function("megarlx: steps"):
                trainer.step()
                trainer.step()
            with torch.profiler.record_function("megarlx: after"):
                pass
        del trainer
    events = profiler.profiler.kineto_results.events()
    begins = {e.name(): e.start_ns() for e in events if e.name().startswith("megarlx: ")}
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for moment, change in changes:
        if moment > begins["megarlx: after"]:
            break
        held += change
        if moment > begins["megarlx: steps"]:
            peak = max(peak, held)
    return Measured(held, peak)
