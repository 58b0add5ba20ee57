"""torch's schedules, one for each shape: those have fixed shapes, and differ in an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import FORWARD, RECV_F, REDUCE_GRAD, SEND_F

from megarlx.comm.groups import Group
from megarlx.parallel.microbatches import Microbatch, Results, call_stage
from megarlx.parallel.pipeline_plan import PipelinePlan
from megarlx.parallel.pipeline_stage import ExchangedStage, SendsUnderWay


class ShapedSchedule:
    """torch's stage and schedule objects for one shape and count, training or evaluation."""

    def __init__(
        self,
        stages: Sequence[nn.Module],
        plan: PipelinePlan,
        group: Group,
        training: bool,
        count: int,
        shape: torch.Size,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.held = plan.stages_of(group.rank)
        self.count = count
        # 1F1B joins sends with receives and waits for both. Elsewhere torch would keep everything
        # it sent until the step's end.
        self.sends = None if plan.schedule == "1f1b" else SendsUnderWay(limit=2 * plan.stages)
        self.calls = [
            _StageCall(stage, None if index == plan.stages - 1 else (shape, dtype), training)
            for stage, index in zip(stages, self.held, strict=True)
        ]
        self.exchanged: list[Any] = [
            ExchangedStage(
                *(call, index, plan, group, self.sends),
                shape=shape,
                dtype=dtype,
                device=device,
                training=training,
            )
            for call, index in zip(self.calls, self.held, strict=True)
        ]
        self.stage_is_complete: Callable[[int], None] | None = None
        self.schedule = self._make(plan, training)

    def _make(self, plan: PipelinePlan, training: bool) -> Any:
        options: dict[str, Any] = {
            "n_microbatches": self.count,
            "loss_fn": _sum_loss if training else None,
            "scale_grads": False,  # the default divides gradients by the number of micro-batches
        }
        if plan.schedule == "1f1b":
            # With fewer micro-batches than ranks, 1F1B is all forwards and then all backwards.
            single = Schedule1F1B if training and self.count >= plan.size else ScheduleGPipe
            return single(self.exchanged[0], **options)
        kinds: dict[str, Any] = {
            "interleaved": ScheduleInterleaved1F1B,
            "zero_bubble": ScheduleInterleavedZeroBubble,
            "zbv": ScheduleZBVZeroBubble,
        }
        if training:
            schedule = kinds[plan.schedule](self.exchanged, **options)
            if plan.splits_backward:
                schedule.register_custom_function(REDUCE_GRAD, self._reduce_gradients)
            return schedule
        kind = ScheduleZBVZeroBubble if plan.schedule == "zbv" else ScheduleLoopedBFS
        schedule = kind(self.exchanged, **options)
        # Left to itself an evaluation walks through the backward actions too, and in zbv fails.
        schedule.pipeline_order_with_comms = {
            rank: [a for a in actions if a.computation_type in (FORWARD, SEND_F, RECV_F)]
            for rank, actions in schedule.pipeline_order_with_comms.items()
        }
        return schedule

    def _reduce_gradients(self, action: Any, _context: Any) -> None:
        if self.stage_is_complete is not None:
            self.stage_is_complete(self.held.index(action.stage_index))

    def run(
        self, parts: list[Microbatch], stage_is_complete: Callable[[int], None] | None
    ) -> Results:
        """One step. Split schedules call `stage_is_complete` with a stage's position on the rank
        when its last weight gradient is there."""
        results = Results()
        self.stage_is_complete = stage_is_complete
        for call in self.calls:
            call.parts, call.results = parts, results
        indices = torch.arange(self.count)
        self.schedule.step(index=indices, target=indices, return_outputs=False)
        if self.sends is not None:
            self.sends.wait()
        for call in self.calls:
            call.parts, call.results = [], Results()
        for stage in self.exchanged:
            stage.clear_runtime_states()
        self.stage_is_complete = None
        return results

    def last_exchange(self) -> str:
        return "; ".join(stage.last_exchange for stage in self.exchanged)


class _StageCall(nn.Module):
    """What torch's schedule calls as the stage, with the number of the micro-batch alone.

    The micro-batch's fields stay here, so they are neither split nor kept for backward by torch.
    """

    def __init__(
        self, stage: nn.Module, sends: tuple[torch.Size, torch.dtype] | None, needs_loss: bool
    ) -> None:
        super().__init__()
        self.stage = stage
        self.sends = sends  # shape and type of its output; None for the last stage
        self.needs_loss = needs_loss
        self.parts: list[Microbatch] = []
        self.results = Results()

    def forward(self, hidden: Tensor | None = None, *, index: Tensor) -> Tensor | tuple[()]:
        output = call_stage(self.stage, hidden, self.parts[int(index)])
        if self.sends is None:
            return self.results.take(output, needs_loss=self.needs_loss)
        shape, dtype = self.sends
        if output.shape != shape or output.dtype != dtype:
            raise ValueError(
                f"pipeline: a stage returned {list(output.shape)} {output.dtype}; the next stage "
                f"was promised {list(shape)} {dtype}"
            )
        return output


def _sum_loss(loss: Tensor, _target: Tensor) -> Tensor:
    return loss.sum()
