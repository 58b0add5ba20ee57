"""The best few layouts of a job over a number of GPUs, by predicted step time.

Tried are all sizes of tensor and pipeline that divide the GPUs (tensor inside a node), the four
schedules with the stages a rank that they usually have, micro-batches of 1, 2, 4 … sequences and
the three recomputations. A layout counts if the code accepts it and its worst rank fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megarlx.comm.hardware import Gpu
from megarlx.parallel.pipeline_plan import Schedule
from megarlx.planning.job import Job
from megarlx.planning.memory import Memory, worst_rank
from megarlx.planning.pieces import Rollouts
from megarlx.planning.step_time import StepTime, mfu, step_time

SCHEDULES: tuple[tuple[Schedule, int], ...] = (
    ("1f1b", 1),
    ("interleaved", 2),
    ("interleaved", 4),
    ("zero_bubble", 1),
    ("zbv", 2),
)
RECOMPUTE = ("none", "selective", "full")
LARGEST_MICROBATCH = 16


@dataclass(frozen=True)
class Prediction:
    """A layout, its worst rank's memory and its step."""

    job: Job
    rank: int
    memory: Memory
    time: StepTime
    mfu: float

    def fits(self, gpu: Gpu) -> bool:
        return self.memory.peak <= gpu.usable_bytes


def predict(job: Job, gpu: Gpu, rollouts: Rollouts | None = None) -> Prediction:
    rank, memory = worst_rank(job, rollouts)
    time = step_time(job, gpu)
    return Prediction(job, rank, memory, time, mfu(job, gpu, time.total))


@dataclass(frozen=True)
class Search:
    """What was found, fastest first, and how many layouts were looked at."""

    best: list[Prediction]
    tried: int
    fitting: int


def search(
    job: Job, gpus: int, gpu: Gpu, *, rollouts: Rollouts | None = None, count: int = 5
) -> Search:
    """Layouts of `gpus` for the job's model and batch; the job's own layout plays no part."""
    fitting: list[Prediction] = []
    tried = 0
    for candidate in layouts(job, gpus, gpu):
        tried += 1
        rank, memory = worst_rank(candidate, rollouts)
        if memory.peak <= gpu.usable_bytes:
            time = step_time(candidate, gpu)
            share = mfu(candidate, gpu, time.total)
            fitting.append(Prediction(candidate, rank, memory, time, share))
    fitting.sort(key=lambda p: (p.time.total, p.memory.peak))
    return Search(fitting[:count], tried, len(fitting))


def layouts(job: Job, gpus: int, gpu: Gpu) -> Iterator[Job]:
    """Every layout that the code accepts, each once."""
    each = gpus // job.replica  # replicas are objectives: their number is not for us to change
    for tp in _divisors(each, gpu.gpus_per_node):
        for pp in _divisors(each // tp, job.model.layers):
            for schedule, virtual_stages in SCHEDULES if pp > 1 else SCHEDULES[:1]:
                candidate = job.changed(
                    tp=tp,
                    pp=pp,
                    dp=each // (tp * pp),
                    schedule=schedule,
                    virtual_stages=virtual_stages,
                    layers_per_stage=None,
                    sequence_parallel=tp > 1,
                )
                try:
                    candidate.check_layout()
                except ValueError:  # a layout that cannot work is no candidate
                    continue
                yield from _pieces(candidate)


def _pieces(job: Job) -> Iterator[Job]:
    sizes = [2**n for n in range(LARGEST_MICROBATCH.bit_length())]
    if job.packed_tokens:  # the policy's micro-batches are filled by tokens, and stay
        sizes = [job.sequences_per_microbatch]
    for each in sizes:
        try:
            job.changed(sequences_per_microbatch=each).check_batch()
        except ValueError:
            continue
        for recompute in RECOMPUTE:
            yield job.changed(sequences_per_microbatch=each, recompute=recompute)


def _divisors(number: int, at_most: int) -> list[int]:
    return [n for n in range(1, min(number, at_most) + 1) if number % n == 0]
