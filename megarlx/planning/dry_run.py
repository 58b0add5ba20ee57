"""One rank of a layout of any size in this one process, and one training step of its messages.

torch's fake process group answers every collective at once with nothing. On the meta device the
model has shapes and no numbers, so a rank of a thousand costs seconds and no memory; on the CPU
the same step computes on zeros, which is how `benchmarks/memory.py` measures any rank's memory.
What is sent is counted where it always is: megarlx/comm/collectives.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarlx.comm.groups import Count, Mesh
from megarlx.comm.launch import start_fake
from megarlx.model.build import ParallelModel, build_model
from megarlx.model.transformer_layer import Recompute
from megarlx.objectives.interface import Batch, Objective
from megarlx.ops import Head, LossInputs, LossSpec, TokenLoss
from megarlx.parallel.microbatches import Microbatch
from megarlx.planning.job import Job
from megarlx.training.trainer import TrainedObjective, Trainer, TrainingStage

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class DryRun:
    """What one rank did in one step."""

    rank: int
    place: dict[str, int]  # on each axis
    stages: tuple[tuple[int, int], ...]  # first layer and one past the last, of each stage held
    parameters: int  # numbers this rank holds
    counts: Mapping[tuple[str, str], Count]  # (axis, operation)
    build_seconds: float
    step_seconds: float

    def sent(self) -> dict[tuple[str, str], int]:
        """Bytes of a step."""
        return {key: count.bytes for key, count in self.counts.items() if count.bytes}


class Shapes(Objective):
    """An objective of the right shapes: next-token prediction on the token 0."""

    def __init__(self, name: str, job: Job, device: torch.device) -> None:
        self.name, self.job, self.device = name, job, device
        self.spec = LossSpec("nll")

    def next_batch(self) -> Batch:
        job, count = self.job, self.job.microbatches
        rows, length = job.sequences_per_microbatch, job.sequence_length
        tokens = torch.zeros(rows, length, dtype=torch.int64, device=self.device)
        # Where documents begin is read on the host, so it holds numbers on every device.
        offsets = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32)
        positions = torch.arange(length, device=self.device).expand(rows, length).contiguous()
        part = Microbatch(tokens, LossInputs(tokens), offsets, positions=positions)
        total = count * tokens.numel()
        weight = torch.ones((), dtype=torch.float64, device=self.device) * total
        return Batch([part] * count, weight=weight, tokens=total)

    def loss(self, head: Head, inputs: LossInputs, normalizer: Tensor) -> TokenLoss:
        rows = self.job.loss_rows
        return head.token_loss(inputs, self.spec, normalizer=normalizer, rows_per_chunk=rows)

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


@contextmanager
def fake_world(rank: int, size: int) -> Iterator[None]:
    """This process as `rank` of `size` that are not there."""
    if dist.is_initialized():
        raise RuntimeError("a dry run needs a process of its own: process groups are already up")
    if not 0 <= rank < size:
        raise ValueError(f"dry run: rank is {rank}; allowed are 0 to {size - 1}")
    if size == 1:
        yield
        return
    start_fake(rank, size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def build(job: Job, device: torch.device) -> ParallelModel:
    """This rank's part of the model; inside `fake_world`."""
    mesh = Mesh.build(job.pp, job.replica, job.dp, job.tp, backend="fake", device=device)
    recompute: Recompute = job.recompute  # type: ignore[assignment]
    return build_model(
        job.model,
        mesh,
        seed=0,
        schedule=job.schedule,
        virtual_stages=job.virtual_stages,
        layers_per_stage=job.layers_per_stage,
        sequence_parallel=job.sequence_parallel,
        recompute=recompute,
        kept_gradients_mib=job.kept_gradients_mib,
        dtype=DTYPES[job.precision],
        device=device,
        bucket_elements=job.bucket_elements,
    )


def trainer_of(job: Job, model: ParallelModel, device: torch.device) -> Trainer:
    parts = [*job.all_objectives]
    if job.objectives > 1:
        parts = [replace(job, name=f"o{i}", objectives=1) for i in range(job.objectives)]
    objectives = [
        TrainedObjective(Shapes(part.name, part, device), part.update, lambda step: 1e-3)
        for part in parts
    ]
    # One step is all there is, and the last step of a stage always averages.
    stage = TrainingStage(
        objectives,
        steps=1 if job.sync_every > 1 else None,
        shared_moments=job.shared_moments,
        combination=job.combine,
        placement="replicas" if job.in_replicas else "colocated",
        sync_every=job.sync_every,
    )
    return Trainer(model, [stage], 0.9 if job.kept.average else None)


def first_turn(job: Job) -> Job:
    """Where objectives alternate, a step is one of them: that of the first step."""
    if not job.alternates:
        return job
    return replace(job, others=(), alternates=False, share_of_steps=1.0)


def dry_run(job: Job, rank: int, device: torch.device | str = "meta") -> DryRun:
    """Builds `rank` of the job and walks one step of it."""
    device, job = torch.device(device), first_turn(job)
    start = time.perf_counter()
    with fake_world(rank, job.gpus):
        model = build(job, device)
        trainer = trainer_of(job, model, device)
        built = time.perf_counter()
        trainer.step()
        stepped = time.perf_counter()
        place = job.layout.coordinates(rank)
        return DryRun(
            rank,
            {
                a: place[a]
                for a in ("pp", "replica", "dp", "tp")
                if a != "replica" or job.replica > 1
            },
            tuple(job.plan.layers[stage] for stage in job.plan.stages_of(place["pp"])),
            sum(p.numel() for p in model.data_parallel.parameters.values()),
            dict(model.mesh.traffic.counts),
            built - start,
            stepped - built,
        )
