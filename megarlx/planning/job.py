"""A model, a batch and a layout: what all of planning looks at.

Letters: T tokens of a micro-batch, t those a rank holds between tensor-parallel parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

from megarlx import plug
from megarlx.choices import AMPERE, Machine, choose_precision
from megarlx.comm.groups import Layout
from megarlx.comm.hardware import Arithmetic
from megarlx.config import Config
from megarlx.config.batch import uneven
from megarlx.config.model import ModelConfig
from megarlx.model.check_layout import LayoutError, check_layout
from megarlx.model.metadata import TensorParallel, parameter_layouts
from megarlx.ops.linear_token_loss import rows_for
from megarlx.parallel.data_parallel import FlatLayout
from megarlx.parallel.metadata import ParameterLayout
from megarlx.parallel.pipeline_plan import PipelinePlan, Schedule
from megarlx.planning.communication import StepShape
from megarlx.planning.pieces import Held, Rollouts, Sizes, StagePart
from megarlx.training.combine import Combination, is_linear
from megarlx.training.parts import UpdateSettings
from megarlx.training.update_rules import rule_of

# Of one objective; what else changes is the layout, and common to all objectives of a step.
OF_ONE = ("sequences_per_microbatch", "objectives", "held", "others", "model", "update")
ELEMENT_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}


def _precision(given: str, on_gpu: bool) -> str:
    """What `auto` becomes; all GPUs that are planned for have bf16."""
    machine = Machine(gpu="the GPU", capability=AMPERE) if on_gpu else Machine()
    return choose_precision(machine).value if given == "auto" else given


@dataclass(frozen=True)
class Job:
    """One layout of one training run: an objective, and `others` of the same step.

    Frozen: a search changes it with `replace`.
    """

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
    kept_gradients_mib: int = 0
    precision: str = "bf16"
    fp8: bool = False  # products of the layers
    tf32: bool = True  # where the precision is fp32
    objectives: int = 1
    on_gpu: bool = True
    bucket_elements: int = 25_000_000
    name: str = "pretraining"
    said_in: str = "training"  # the table that says sequences_per_step
    others: tuple[Job, ...] = ()  # further objectives of a stage, each with a batch of its own
    alternates: bool = False  # a step trains one of the objectives
    share_of_steps: float = 1.0  # how many of the stage's steps train this one
    replica: int = 1
    in_replicas: bool = False  # each replica trains one of the objectives
    generates_together: bool = True  # and whether all help the policy's with its samples
    sync_every: int = 1
    averages_per_step: float = 1.0
    shared_moments: bool = False
    combination: str = "weighted_sum"
    update: UpdateSettings = field(default_factory=UpdateSettings)
    held: Held | None = None  # absent: that of `objectives`
    packed_tokens: int | None = None  # of a step of RL, in as few micro-batches as hold it
    document_length: int | None = None  # where sequences are packed documents
    rollouts: Rollouts | None = None  # what makes its samples, and has caches all along
    samples_per_step: int = 0  # that it generates

    @staticmethod
    def of(config: Config, gpus: int, *, objectives: int = 1, on_gpu: bool = True) -> Job:
        """So many objectives with the batch of [training]; `stages.job_of_stage` follows stages."""
        job = Job.configured(config, gpus, objectives=objectives, on_gpu=on_gpu)
        job.check(gpus)
        return job

    @staticmethod
    def configured(config: Config, gpus: int, **changes: Any) -> Job:
        """The configured layout, not checked; data parallelism takes the processes left over."""
        layout, training = config.layout, config.training
        if gpus < 1:
            raise ValueError(f"gpus is {gpus}; it must be at least 1")
        held = layout.pipeline * layout.tensor * layout.replica
        return Job(
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
            kept_gradients_mib=training.kept_gradients_mib,
            precision=_precision(training.precision, changes.get("on_gpu", True)),
            fp8=training.fp8 != "none",
            tf32=training.tf32,
            replica=layout.replica,
            update=UpdateSettings.of(config.optimizer),
            **changes,
        )

    def changed(self, **changes: Any) -> Job:
        """Another layout, or other pieces, of the same model and batch."""
        common = {k: v for k, v in changes.items() if k not in OF_ONE}
        if self.others and common:
            changes["others"] = tuple(one.changed(**common) for one in self.others)
        job = replace(self, **changes)
        job.__dict__["_sizes"] = self._sizes
        if not job.packed_tokens and job.objectives == self.objectives:
            job.__dict__["flops_of_its_own"] = self.flops_of_its_own
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
        at_once = self.sequences_per_microbatch * self.trainers
        times = "dp" if self.trainers == self.dp else "replica x dp"
        if not self.packed_tokens and (said := uneven(self.sequences_per_step, at_once, times)):
            raise LayoutError(f"{self.said_in}.sequences_per_step {said}")
        self.plan.check_microbatches(self.microbatches)
        for one in self.others:
            one.check_batch()

    @cached_property
    def layout(self) -> Layout:
        return Layout(pp=self.pp, replica=self.replica, dp=self.dp, tp=self.tp)

    @property
    def all_objectives(self) -> tuple[Job, ...]:
        return (self, *self.others)

    def trained_on(self, rank: int) -> tuple[Job, ...]:
        """The objectives that a global rank trains."""
        if not self.in_replicas:
            return self.all_objectives
        return (self.all_objectives[self.layout.coordinates(rank)["replica"]],)

    @property
    def trainers(self) -> int:
        """Who share out an objective's batch."""
        return self.dp if self.in_replicas else self.replica * self.dp

    @property
    def combine(self) -> Combination:
        found: Combination = plug.resolve("combination", self.combination)
        return found

    @property
    def kept(self) -> Held:
        if self.held is not None:
            return self.held
        return Held(self.objectives, self.objectives * len(rule_of(self.update).state))

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
        if not self.packed_tokens:
            return self.sequences_per_step // (self.sequences_per_microbatch * self.trainers)
        count = -(-self.packed_tokens // (self.tokens_per_microbatch * self.trainers))
        while not self.plan.allows(count):
            count += 1
        return count

    @property
    def tokens_per_microbatch(self) -> int:
        return self.sequences_per_microbatch * self.sequence_length

    @property
    def tokens_between(self) -> int:
        """Tokens a rank holds between tensor-parallel parts."""
        return self.tokens_per_microbatch // (self.tp if self.splits_sequence else 1)

    @property
    def tokens_per_step(self) -> int:
        """That this objective is trained on."""
        return self.packed_tokens or self.sequences_per_step * self.sequence_length

    @property
    def seen_length(self) -> int:
        """The longest that a token can look back."""
        return self.document_length or self.sequence_length

    @property
    def splits_sequence(self) -> bool:
        return self.sequence_parallel and self.tp > 1

    @property
    def arithmetic(self) -> Arithmetic:
        """Of the head's products and of attention."""
        if self.precision == "fp32" and self.tf32:
            return "tf32"
        return self.precision  # type: ignore[return-value]

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

    @property
    def keeps_gradients(self) -> bool:
        """Whether the gradients by all logits of a micro-batch are there at one time."""
        tokens = self.tokens_per_microbatch
        each = self.element_bytes if self.on_gpu else self.wide_bytes
        mib = tokens * self.local_vocabulary * each / 2**20
        return tokens > self.loss_rows and mib <= self.kept_gradients_mib

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

    def different_ranks(self) -> list[int]:
        """One of every kind: of shapes, and of objectives."""
        replicas = range(self.replica if self.in_replicas else 1)
        return [
            self.layout.rank_at(pp=pp, replica=replica, dp=0, tp=0)
            for replica in replicas
            for pp in self.kinds()
        ]

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
        """The model's own of all objectives, without recomputation."""
        return sum(o.flops_of_its_own * o.share_of_steps for o in self.all_objectives)

    @cached_property
    def flops_of_its_own(self) -> float:
        each = self.model.flops_per_token(self.seen_length)
        return each * self.tokens_per_step * self.objectives

    @property
    def trained_tokens(self) -> float:
        """In a step, of all objectives."""
        return sum(o.tokens_per_step * o.objectives * o.share_of_steps for o in self.all_objectives)

    @property
    def step_shape(self) -> StepShape:
        return StepShape(
            tokens_per_microbatch=self.tokens_per_microbatch,
            microbatches=self.microbatches,
            sequence_parallel=self.sequence_parallel,
            recompute=self.recompute,
            element_bytes=self.element_bytes,
            wide_bytes=self.wide_bytes,
            objectives=self.updates_per_step,
            rows_per_chunk=self.loss_rows,
            bucket_elements=self.bucket_elements,
            in_replicas=self.in_replicas,
            of_replicas=len(self.all_objectives),
            local_steps=self.sync_every > 1,
            averages=self.averages_per_step,
            shared_moments=self.shared_moments,
            linear=is_linear(self.combine),
        )

    @property
    def updates_per_step(self) -> int:
        """Objectives whose gradients a rank has at the end of a step."""
        if self.alternates or self.in_replicas:
            return 1
        return sum(one.objectives for one in self.all_objectives)

    def __str__(self) -> str:
        parts = [f"tp={self.tp}", f"pp={self.pp}", f"dp={self.dp}"]
        if self.replica > 1:
            parts.append(f"replica={self.replica}")
        if self.pp > 1:
            parts.append(self.schedule + (f"x{self.virtual_stages}" * (self.virtual_stages > 1)))
        if self.splits_sequence:
            parts.append("sp")
        return " ".join([*parts, f"mb={self.sequences_per_microbatch}", self.recompute])
