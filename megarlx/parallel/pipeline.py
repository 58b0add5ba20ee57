"""Forward and backward over micro-batches, on one rank or through a pipeline of ranks.

A stage is an ordinary module, called as

    stage(tokens or hidden, **fields)

The first stage is given the micro-batch's tokens, every other one the hidden states of the stage
before it. The fields (targets, masks, advantages, positions, cu_seqlens ...) are the micro-batch's
slice of the inputs along their first dimension; numbers and tensors without dimensions go to each
micro-batch whole. The last stage's forward ends in norm, head and token loss. It returns the loss
with shape [1], or (loss, outputs) where `outputs` is a dict of tensors to hand to the caller
(log-probs, metrics), or in an evaluation the dict alone. It must live in `forward` because split
schedules see only gradients of what a stage's own forward used.

Losses are summed over micro-batches and gradients added up, never averaged: the normaliser is one
of the fields.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
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

from megarlx.comm.collectives import CollectiveError
from megarlx.comm.groups import Group
from megarlx.parallel.pipeline_plan import PipelinePlan
from megarlx.parallel.pipeline_stage import ExchangedStage

Inputs = Mapping[str, Any]
OnGradientReady = Callable[[nn.Parameter], None]
HiddenShape = Callable[[torch.Size], Sequence[int]]


@dataclass
class Results:
    """What the last stage computed; empty on ranks that do not hold it."""

    losses: list[Tensor] = field(default_factory=list)  # of each micro-batch, shape [1], detached
    outputs: list[dict[str, Tensor]] = field(default_factory=list)  # of each, detached

    def take(self, output: Any, *, needs_loss: bool) -> Tensor | tuple[()]:
        """Keeps what the last stage returned; gives back the loss, to go backward from."""
        loss, outputs = output if isinstance(output, tuple) else (output, {})
        if isinstance(output, dict):
            loss, outputs = None, output
        self.outputs.append({name: value.detach() for name, value in outputs.items()})
        if loss is None:
            if needs_loss:
                raise ValueError(f"pipeline: the last stage returned {sorted(outputs)} and no loss")
            return ()
        if loss.shape != (1,):
            raise ValueError(
                f"pipeline: the last stage's loss has the shape {list(loss.shape)}; it must be [1]"
            )
        self.losses.append(loss.detach())
        return loss


class Pipeline:
    """Runs the stages that this rank holds. Every rank of `group` makes the same calls.

    `hidden_shape` gives the shape of the hidden states between stages from the shape of one
    micro-batch's tokens. Ranks need not be told anything else about each other: all are given the
    same inputs. Each combination of shape and number of micro-batches, and each of training and
    evaluation, has its own schedule, made when it first comes.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],  # those of plan.stages_of(group.rank), in that order
        plan: PipelinePlan,
        group: Group,
        *,
        hidden_shape: HiddenShape,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        if plan.size != group.size:
            raise ValueError(
                f"pipeline: the plan is for {plan.size} ranks; group '{group.axis}' has "
                f"{group.size}"
            )
        self.held = plan.stages_of(group.rank)
        if len(stages) != len(self.held):
            raise ValueError(
                f"pipeline: rank {group.rank} holds the stages {self.held}, but was given "
                f"{len(stages)} modules"
            )
        self.stages = list(stages)
        self.plan = plan
        self.group = group
        self.hidden_shape = hidden_shape
        self.dtype = dtype
        self.device = torch.device(device)
        self._schedules: dict[tuple[bool, int, torch.Size], _ShapedSchedule] = {}

    @property
    def holds_last_stage(self) -> bool:
        return self.plan.stages - 1 in self.held

    def forward_backward(
        self,
        inputs: Inputs,
        microbatches: int,
        *,
        on_gradient_ready: OnGradientReady | None = None,
    ) -> Results:
        """Adds the gradients of all micro-batches to each parameter's `.grad`.

        `on_gradient_ready` is called once for each parameter, as soon as no more will be added:
        in the backward of the last micro-batch, or, where backward is split, after the last
        weight gradient of the stage. (Gradients of tied weights are this stage's share only.)
        """
        self.plan.check_microbatches(microbatches)
        parts = split_microbatches(inputs, microbatches)
        if on_gradient_ready is None:
            return self._train(parts, None)
        watch = _GradientWatch(self.stages, microbatches, on_gradient_ready)
        with nullcontext() if self.plan.splits_backward else watch.hooks():
            results = self._train(parts, watch)
        watch.finish()
        return results

    def forward_only(self, inputs: Inputs, microbatches: int = 1) -> Results:
        """An evaluation or log-prob pass, without gradients. Any number of micro-batches."""
        if microbatches < 1:
            raise ValueError(f"pipeline: microbatches is {microbatches}; it must be at least 1")
        parts = split_microbatches(inputs, microbatches)
        with torch.no_grad():
            if self.plan.size > 1:
                return self._scheduled(parts, training=False)
            results = Results()
            for part in parts:
                results.take(_call(self.stages[0], None, part), needs_loss=False)
            return results

    def _train(self, parts: list[dict[str, Any]], watch: _GradientWatch | None) -> Results:
        if self.plan.size > 1:
            return self._scheduled(parts, training=True, watch=watch)
        results = Results()
        for part in parts:
            loss = results.take(_call(self.stages[0], None, part), needs_loss=True)
            torch.autograd.backward(loss)
        return results

    def _scheduled(
        self, parts: list[dict[str, Any]], *, training: bool, watch: _GradientWatch | None = None
    ) -> Results:
        shape = torch.Size(self.hidden_shape(parts[0]["tokens"].shape))
        key = (training, len(parts), shape)
        # Taken out while it runs: one that stopped half-way is of no more use.
        schedule = self._schedules.pop(key, None) or _ShapedSchedule(self, *key)
        try:
            results = schedule.run(parts, watch)
        except RuntimeError as error:
            what = "pipeline forward and backward" if training else "pipeline forward"
            where = f"{what} ({schedule.last_exchange()})"
            cause = _root_cause(error)
            if cause is error:
                raise CollectiveError(self.group, where, error) from error
            # torch wraps what a stage raised in an error of its own, which says less.
            cause.add_note(
                f"in {where} on rank {self.group.global_rank} at step {self.group.traffic.step}"
            )
            raise cause from None
        self._schedules[key] = schedule
        return results


class _ShapedSchedule:
    """torch's stage and schedule objects for one shape and count, training or evaluation."""

    def __init__(self, pipeline: Pipeline, training: bool, count: int, shape: torch.Size) -> None:
        plan = pipeline.plan
        self.held = pipeline.held
        self.count = count
        self.calls = [
            _StageCall(
                module, None if index == plan.stages - 1 else (shape, pipeline.dtype), training
            )
            for module, index in zip(pipeline.stages, self.held, strict=True)
        ]
        self.exchanged = [
            ExchangedStage(
                call,
                index,
                plan,
                pipeline.group,
                shape=shape,
                dtype=pipeline.dtype,
                device=pipeline.device,
                training=training,
            )
            for call, index in zip(self.calls, self.held, strict=True)
        ]
        self.watch: _GradientWatch | None = None
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
                schedule.register_custom_function(REDUCE_GRAD, self._stage_is_complete)
            return schedule
        kind: Any = ScheduleZBVZeroBubble if plan.schedule == "zbv" else ScheduleLoopedBFS
        schedule = kind(self.exchanged, **options)
        # Left to itself an evaluation walks through the backward actions too, and in zbv fails.
        schedule.pipeline_order_with_comms = {
            rank: [a for a in actions if a.computation_type in (FORWARD, SEND_F, RECV_F)]
            for rank, actions in schedule.pipeline_order_with_comms.items()
        }
        return schedule

    def _stage_is_complete(self, action: Any, _context: Any) -> None:
        if self.watch is not None:
            self.watch.stage_is_complete(self.held.index(action.stage_index))

    def run(self, parts: list[dict[str, Any]], watch: _GradientWatch | None) -> Results:
        results = Results()
        self.watch = watch
        for call in self.calls:
            call.parts, call.results = parts, results
        indices = torch.arange(self.count)
        try:
            self.schedule.step(index=indices, target=indices, return_outputs=False)
        finally:
            self.watch = None
            for call in self.calls:
                call.parts, call.results = [], Results()
        for stage in self.exchanged:
            stage.clear_runtime_states()
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
        self.parts: list[dict[str, Any]] = []
        self.results = Results()

    def forward(self, hidden: Tensor | None = None, *, index: Tensor) -> Tensor | tuple[()]:
        output = _call(self.stage, hidden, self.parts[int(index)])
        if self.sends is None:
            return self.results.take(output, needs_loss=self.needs_loss)
        shape, dtype = self.sends
        if output.shape != shape or output.dtype != dtype:
            raise ValueError(
                f"pipeline: a stage returned {list(output.shape)} {output.dtype}; the next stage "
                f"was promised {list(shape)} {dtype}"
            )
        return output


class _GradientWatch:
    """Calls `ready` once for each parameter, when its gradient is complete."""

    def __init__(
        self, stages: Sequence[nn.Module], microbatches: int, ready: OnGradientReady
    ) -> None:
        self.ready = ready
        self.microbatches = microbatches
        self.parameters = [[p for p in s.parameters() if p.requires_grad] for s in stages]
        # Additions still to come; a weight that two stages of this rank share gets two of each.
        self.pending: Counter[nn.Parameter] = Counter()
        for held in self.parameters:
            self.pending.update(dict.fromkeys(held, microbatches))

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = [p.register_post_accumulate_grad_hook(self._count) for p in self.pending]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def stage_is_complete(self, position: int) -> None:
        for parameter in self.parameters[position]:
            self._count(parameter, self.microbatches)

    def finish(self) -> None:
        """Parameters that some micro-batch, or all of them, did not use."""
        for parameter in list(self.pending):
            self._count(parameter, self.pending[parameter])

    def _count(self, parameter: Tensor, times: int = 1) -> None:
        assert isinstance(parameter, nn.Parameter)
        self.pending[parameter] -= times
        if self.pending[parameter] == 0:
            del self.pending[parameter]
            self.ready(parameter)


def split_microbatches(inputs: Inputs, count: int) -> list[dict[str, Any]]:
    """Cuts every tensor's first dimension into `count` equal views."""
    if "tokens" not in inputs:
        raise ValueError(f"pipeline: inputs are {sorted(inputs)}; 'tokens' is missing")
    parts: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            slices: Sequence[Any] = [value] * count
        elif len(value) % count or len(value) == 0:
            raise ValueError(
                f"pipeline: inputs['{name}'] has the shape {list(value.shape)}; the first "
                f"dimension must be a multiple of the {count} micro-batches"
            )
        else:
            slices = value.split(len(value) // count)
        for part, piece in zip(parts, slices, strict=True):
            part[name] = piece
    return parts


def _call(stage: nn.Module, hidden: Tensor | None, part: dict[str, Any]) -> Any:
    fields = {name: value for name, value in part.items() if name != "tokens"}
    return stage(part["tokens"] if hidden is None else hidden, **fields)


def _sum_loss(loss: Tensor, _target: Tensor) -> Tensor:
    return loss.sum()


def _root_cause(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _root_cause(error.__cause__)
