"""Which layers each stage of a pipeline holds, and which rank holds which stages.

Pure data, so that a layout can be looked at (and refused) without a process group.

    p  ranks in the pipeline      v  stages on each rank      m  micro-batches of a step
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Schedule = Literal["1f1b", "interleaved", "zero_bubble", "zbv"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)

# Input gradients and weight gradients are two passes: gradient hooks do not fire.
SPLIT_BACKWARD = ("zero_bubble", "zbv")

# Stages on each rank that a schedule allows: at least, at most.
_VIRTUAL_STAGES: dict[str, tuple[int, int | None]] = {
    "1f1b": (1, 1),
    "interleaved": (2, None),
    "zero_bubble": (1, None),
    "zbv": (2, 2),
}


@dataclass(frozen=True)
class PipelinePlan:
    schedule: Schedule
    size: int  # p
    virtual_stages: int  # v
    layers: tuple[tuple[int, int], ...]  # of each stage: first layer, and one past the last

    @staticmethod
    def make(
        layers: int,
        size: int,
        schedule: Schedule = "1f1b",
        virtual_stages: int = 1,
        layers_per_stage: Sequence[int] | None = None,
    ) -> PipelinePlan:
        """Splits `layers` into size x virtual_stages stages, evenly unless told how."""
        _check_schedule(schedule, size, virtual_stages)
        stages = size * virtual_stages
        if layers_per_stage is None:
            if layers < stages:
                near = [p for p in range(1, size + 1) if p * virtual_stages <= layers]
                raise ValueError(
                    f"pipeline: {layers} layers cannot fill {stages} stages (size {size} x "
                    f"virtual_stages {virtual_stages}); with virtual_stages {virtual_stages} "
                    + (f"a size of 1 to {near[-1]} would do" if near else "no size would do")
                )
            counts = _even_split(layers, stages)
        else:
            counts = tuple(layers_per_stage)
            _check_layers_per_stage(counts, layers, stages)
        edges = [sum(counts[:stage]) for stage in range(stages + 1)]
        return PipelinePlan(schedule, size, virtual_stages, tuple(itertools.pairwise(edges)))

    @property
    def stages(self) -> int:
        return len(self.layers)

    @property
    def splits_backward(self) -> bool:
        return self.schedule in SPLIT_BACKWARD

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages a rank holds: dealt out in turn; in zbv the second row runs backwards."""
        if self.schedule == "zbv":
            return (rank, self.stages - 1 - rank)
        return tuple(range(rank, self.stages, self.size))

    def rank_of(self, stage: int) -> int:
        row, place = divmod(stage, self.size)
        return self.size - 1 - place if self.schedule == "zbv" and row == 1 else place

    def crosses_ranks(self, stage: int) -> bool:
        """Whether what this stage hands to the next one is sent to another rank."""
        return stage + 1 < self.stages and self.rank_of(stage) != self.rank_of(stage + 1)

    def allows(self, microbatches: int) -> bool:
        if microbatches < 1:
            return False
        if self.size == 1 or self.schedule in ("1f1b", "zbv"):
            return True
        # These run in rounds of at least p micro-batches, all rounds of one length.
        return microbatches % max(1, microbatches // self.size) == 0

    def check_microbatches(self, microbatches: int) -> None:
        if self.allows(microbatches):
            return
        near = sorted(
            (m for m in range(1, max(1, microbatches) + self.size + 1) if self.allows(m)),
            key=lambda m: abs(m - microbatches),
        )[:3]
        raise ValueError(
            f"pipeline: the {self.schedule} schedule over {self.size} ranks cannot run "
            f"{microbatches} micro-batches; it needs any number up to {2 * self.size - 1}, or one "
            f"that splits into equal rounds of at least {self.size}. Nearest: "
            + ", ".join(map(str, sorted(near)))
        )

    def bubble_fraction(self, microbatches: int) -> float:
        """The share of a rank's time with nothing to do, when all stages cost the same.

        Forward, input gradient and weight gradient are counted as equally long. Exact from m = p
        on (2p - 1 for zbv); below that no schedule can fill the pipeline, and this is what is at
        least lost.
        """
        work = self.virtual_stages * microbatches * (3 if self.splits_backward else 1)
        return (self.size - 1) / (work + self.size - 1)

    def sends_per_step(self, rank: int, microbatches: int) -> tuple[int, int]:
        """How many hidden states and how many gradients of them this rank sends in a step."""
        held = self.stages_of(rank)
        forward = sum(self.crosses_ranks(stage) for stage in held)
        backward = sum(stage > 0 and self.crosses_ranks(stage - 1) for stage in held)
        return forward * microbatches, backward * microbatches


def _check_schedule(schedule: str, size: int, virtual_stages: int) -> None:
    if schedule not in SCHEDULES:
        raise ValueError(f"pipeline: schedule is '{schedule}'; allowed are {', '.join(SCHEDULES)}")
    if size < 1 or virtual_stages < 1:
        raise ValueError(
            f"pipeline: size is {size} and virtual_stages {virtual_stages}; both must be at least 1"
        )
    if size == 1:
        if schedule != "1f1b" or virtual_stages != 1:
            raise ValueError(
                f"pipeline: size is 1 with schedule '{schedule}' and virtual_stages "
                f"{virtual_stages}; one rank has no pipeline: use '1f1b' and 1"
            )
        return
    least, most = _VIRTUAL_STAGES[schedule]
    if virtual_stages < least or (most is not None and virtual_stages > most):
        allowed = f"exactly {least}" if least == most else f"at least {least}"
        raise ValueError(
            f"pipeline: virtual_stages is {virtual_stages}; schedule '{schedule}' needs {allowed}"
        )


def _check_layers_per_stage(counts: tuple[int, ...], layers: int, stages: int) -> None:
    if len(counts) != stages:
        raise ValueError(
            f"pipeline: layers_per_stage {counts} has {len(counts)} entries; there are {stages} "
            "stages (size x virtual_stages)"
        )
    if sum(counts) != layers:
        raise ValueError(
            f"pipeline: layers_per_stage {counts} adds up to {sum(counts)}; the model has {layers}"
        )
    # The first stage also embeds and the last also computes the loss: they have work without one.
    if min(counts) < 0 or 0 in counts[1:-1]:
        raise ValueError(
            f"pipeline: layers_per_stage {counts}; only the first and the last stage may hold no "
            "layer, and none a negative number"
        )


def _even_split(layers: int, stages: int) -> tuple[int, ...]:
    """As even as it gets; what is over goes to the middle, away from the embedding and the head."""
    each, over = divmod(layers, stages)
    middle_first = [*range(1, stages - 1), 0, stages - 1]
    extra = set(middle_first[:over])
    return tuple(each + (stage in extra) for stage in range(stages))
