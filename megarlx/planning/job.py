"""A model, a batch and a layout: what all of planning looks at.

Letters: T tokens of a micro-batch, t those a rank holds between tensor-parallel parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

from megarlx.comm.groups import Layout
from megarlx.config import Config
from megarlx.config.model import ModelConfig
from megarlx.model.check_layout import LayoutError, check_layout
from megarlx.model.communication import StepShape
from megarlx.model.metadata import TensorParallel, parameter_layouts
from megarlx.ops.linear_token_loss import rows_for
from megarlx.parallel.data_parallel import FlatLayout
from megarlx.parallel.metadata import ParameterLayout
from megarlx.parallel.pipeline_plan import PipelinePlan, Schedule

ELEMENT_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}


@dataclass(frozen=True)
class StagePart:
    """One pipeline stage of a rank: its number of layers and what stands at its ends."""

    index: int
    layers: int
    embedding: bool
    head: bool


@dataclass(frozen=True)
class Sizes:
    """What a rank of one kind holds."""

    parameters: int  # numbers, vocabulary padding and copies included
    flat: int  # of the flat buffer, which pads between parameters
    completes_gradients: bool  # some are parts of a sum over other axes: reduced after backward


@dataclass(frozen=True)
class Job:
    """One layout of one training run. Frozen: a search changes it with `replace`."""

    model: ModelConfig
    sequences_per_step: int
    sequences_per_microbatch: int
    sequence_length: int
    tp: int = 1
    pp: int = 1
    dp: int = 1
    schedule: Schedule = "1f1b"
    virtual_stages: int = 1
    layers_per_stage: tuple[int, ...] | None = None
    sequence_parallel: bool = False
    recompute: str = "none"
    precision: str = "bf16"
    objectives: int = 1
    on_gpu: bool = True
    bucket_elements: int = 25_000_000

    @staticmethod
    def of(config: Config, gpus: int, *, objectives: int = 1, on_gpu: bool = True) -> Job:
        """The configured layout; data parallelism takes the processes that are left."""
        layout, training = config.layout, config.training
        if layout.replica != 1:
            raise LayoutError(
                f"layout.replica is {layout.replica}; plans are for 1, where every rank runs all "
                "objectives"
            )
        if gpus < 1:
            raise ValueError(f"gpus is {gpus}; it must be at least 1")
        held = layout.pipeline * layout.tensor
        job = Job(
            config.model,
            sequences_per_step=training.sequences_per_step,
            sequences_per_microbatch=training.sequences_per_microbatch,
            sequence_length=training.sequence_length,
            tp=layout.tensor,
            pp=layout.pipeline,
            dp=layout.data if layout.data is not None else max(1, gpus // held),
            schedule=layout.schedule,
            virtual_stages=layout.virtual_stages,
            layers_per_stage=layout.layers_per_stage,
            sequence_parallel=layout.sequence_parallel,
            recompute=training.recompute,
            precision=training.precision,
            objectives=objectives,
            on_gpu=on_gpu,
        )
        job.check(gpus)
        return job

    def changed(self, **changes: Any) -> Job:
        """Another layout, or other pieces, of the same model and batch."""
        job = replace(self, **changes)
        job.__dict__["_sizes"] = self._sizes
        if job.objectives == self.objectives:
            job.__dict__["flops_per_step"] = self.flops_per_step
        return job

    def check(self, gpus: int | None = None) -> None:
        """Raises LayoutError or ValueError with the numbers and what is near and works."""
        self.check_layout(gpus)
        self.check_batch()

    def check_layout(self, gpus: int | None = None) -> None:
        check_layout(
            self.model,
            self.layout,
            world_size=gpus,
            sequence_length=self.sequence_length,
            sequence_parallel=self.sequence_parallel,
            stages_per_rank=self.virtual_stages,
            layers_per_stage=self.layers_per_stage,
        )

    def check_batch(self) -> None:
        if self.objectives < 1:
            raise ValueError(f"objectives is {self.objectives}; it must be at least 1")
        at_once = self.sequences_per_microbatch * self.dp
        if self.sequences_per_step % at_once:
            raise LayoutError(
                f"sequences_per_step is {self.sequences_per_step}; sequences_per_microbatch x dp = "
                f"{at_once} must divide it"
            )
        self.plan.check_microbatches(self.microbatches)

    @cached_property
    def layout(self) -> Layout:
        return Layout(pp=self.pp, dp=self.dp, tp=self.tp)

    @cached_property
    def plan(self) -> PipelinePlan:
        return PipelinePlan.make(
            self.model.layers, self.pp, self.schedule, self.virtual_stages, self.layers_per_stage
        )

    @property
    def gpus(self) -> int:
        return self.layout.world_size

    @property
    def microbatches(self) -> int:
        return self.sequences_per_step // (self.sequences_per_microbatch * self.dp)

    @property
    def tokens_per_microbatch(self) -> int:
        return self.sequences_per_microbatch * self.sequence_length

    @property
    def tokens_between(self) -> int:
        """Tokens a rank holds between tensor-parallel parts."""
        return self.tokens_per_microbatch // (self.tp if self.splits_sequence else 1)

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.sequence_length

    @property
    def splits_sequence(self) -> bool:
        return self.sequence_parallel and self.tp > 1

    @property
    def element_bytes(self) -> int:
        """Of weights and activations."""
        return ELEMENT_BYTES[self.precision]

    @property
    def wide_bytes(self) -> int:
        """Of masters, gradients and losses."""
        return max(4, self.element_bytes)

    @property
    def local_vocabulary(self) -> int:
        return self.model.padded_vocab(self.tp) // self.tp

    @property
    def loss_rows(self) -> int:
        """Rows of logits that exist at one time."""
        rows = rows_for(self.local_vocabulary, on_cuda=self.on_gpu)
        return min(rows, self.tokens_per_microbatch)

    def stages(self, pp_rank: int) -> Iterator[StagePart]:
        for index in self.plan.stages_of(pp_rank):
            first, last = self.plan.layers[index]
            yield StagePart(index, last - first, index == 0, index == self.plan.stages - 1)

    def parameter_layouts(self, rank: int) -> dict[str, ParameterLayout]:
        """Of every parameter that a global rank holds, in the order of its flat buffer."""
        place = self.layout.coordinates(rank)
        tp = TensorParallel(self.tp, place["tp"], self.splits_sequence)
        layouts: dict[str, ParameterLayout] = {}
        for stage in self.stages(place["pp"]):
            first, last = self.plan.layers[stage.index]
            layouts |= parameter_layouts(
                self.model, tp, first=first, last=last, embedding=stage.embedding, head=stage.head
            )
        return layouts

    def flat_layout(self, rank: int) -> FlatLayout:
        order = [(n, p.shape, p.weight_decay) for n, p in self.parameter_layouts(rank).items()]
        return FlatLayout.make(order[::-1], self.dp, self.bucket_elements)

    def kind(self, pp_rank: int) -> tuple[StagePart, ...]:
        """Pipeline ranks of one kind hold the same shapes: most of a long pipeline does."""
        return tuple(replace(stage, index=0) for stage in self.stages(pp_rank))

    def kinds(self) -> list[int]:
        """The first pipeline rank of every kind."""
        return list({self.kind(pp): pp for pp in reversed(range(self.pp))}.values())

    def sizes(self, pp_rank: int) -> Sizes:
        key = (self.kind(pp_rank), self.tp, self.dp, self.splits_sequence, self.bucket_elements)
        if key not in self._sizes:
            rank = self.layout.rank_at(pp=pp_rank, replica=0, dp=0, tp=0)
            layouts = self.parameter_layouts(rank).values()
            self._sizes[key] = Sizes(
                sum(prod(layout.shape) for layout in layouts),
                self.flat_layout(rank).size,
                any(p.tied or any(piece.sum_gradients for piece in p.pieces) for p in layouts),
            )
        return self._sizes[key]

    @cached_property
    def _sizes(self) -> dict[Any, Sizes]:
        """Known to all jobs that were made from one by `changed`: a search asks again and again."""
        return {}

    @cached_property
    def flops_per_step(self) -> float:
        """The model's own, without recomputation."""
        each = self.model.flops_per_token(self.sequence_length)
        return each * self.tokens_per_step * self.objectives

    @property
    def step_shape(self) -> StepShape:
        return StepShape(
            tokens_per_microbatch=self.tokens_per_microbatch,
            microbatches=self.microbatches,
            sequence_parallel=self.sequence_parallel,
            recompute=self.recompute,
            element_bytes=self.element_bytes,
            wide_bytes=self.wide_bytes,
            objectives=self.objectives,
            rows_per_chunk=self.loss_rows,
            bucket_elements=self.bucket_elements,
        )

    def __str__(self) -> str:
        parts = [f"tp={self.tp}", f"pp={self.pp}", f"dp={self.dp}"]
        if self.pp > 1:
            parts.append(self.schedule + (f"x{self.virtual_stages}" * (self.virtual_stages > 1)))
        if self.splits_sequence:
            parts.append("sp")
        return " ".join([*parts, f"mb={self.sequences_per_microbatch}", self.recompute])
