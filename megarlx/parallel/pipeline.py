"""Forward and backward over micro-batches, on one rank or through a pipeline of ranks.

What a stage is given: microbatches.py. Losses are summed over micro-batches and gradients added up,
never averaged: the normaliser is the loss's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from megarlx.comm.groups import Group
from megarlx.ops import weight_gradient
from megarlx.parallel.microbatches import (
    Loss,
    Microbatch,
    Results,
    call_stage,
    check_microbatches,
)
from megarlx.parallel.pipeline_actions import rank_actions
from megarlx.parallel.pipeline_plan import PipelinePlan
from megarlx.parallel.pipeline_step import PipelineStep

OnGradientReady = Callable[[nn.Parameter], None]
HiddenShape = Callable[[torch.Size], Sequence[int]]


class Pipeline:
    """Runs the stages that this rank holds. Every rank of `group` makes the same calls.

    `hidden_shape` gives the shape of the hidden states between stages from the shape of one
    micro-batch's tokens. Ranks need not be told anything else about each other: all are given the
    same inputs.
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
        modules = [module for stage in stages for module in stage.modules()]
        self._adders: list[Any] = [m for m in modules if hasattr(m, "add_by_product")]

    @property
    def holds_last_stage(self) -> bool:
        return self.plan.stages - 1 in self.held

    def forward_backward(
        self,
        parts: Sequence[Microbatch],
        loss: Loss | None,
        *,
        on_gradient_ready: OnGradientReady | None = None,
    ) -> Results:
        """Adds the gradients of all micro-batches to each parameter's `.grad`.

        `on_gradient_ready` is called once for each parameter, as soon as no more will be added:
        in the backward of the last micro-batch, or, where backward is split, after the last
        weight gradient of the stage. (Gradients of tied weights are this stage's share only.)
        """
        check_microbatches(parts)
        self.plan.check_microbatches(len(parts))
        if on_gradient_ready is None:
            return self._train(parts, loss, None)
        watch = _GradientWatch(self.stages, len(parts), on_gradient_ready)
        with nullcontext() if self.plan.splits_backward else watch.hooks():
            results = self._train(parts, loss, watch)
        watch.finish()
        return results

    @contextmanager
    def _adding_by_product(self) -> Iterator[None]:
        """Inside, every backward is one for all weights: their gradients may be added past
        autograd. It would add those that nobody asked for, too."""
        adders = self._adders if self.device.type in weight_gradient.DEVICES else []
        for module in adders:
            module.add_by_product(True)
        try:
            yield
        finally:
            for module in adders:
                module.add_by_product(False)

    def forward_only(self, parts: Sequence[Microbatch], loss: Loss | None) -> Results:
        """An evaluation or log-prob pass, without gradients. Any number of micro-batches."""
        check_microbatches(parts)
        with torch.no_grad():
            if self.plan.size > 1:
                return self._scheduled(parts, loss, training=False)
            results = Results()
            for part in parts:
                results.take(call_stage(self.stages[0], None, part, loss), needs_loss=False)
            return results

    def _train(
        self, parts: Sequence[Microbatch], loss: Loss | None, watch: _GradientWatch | None
    ) -> Results:
        with self._adding_by_product():
            if self.plan.size > 1:
                return self._scheduled(parts, loss, training=True, watch=watch)
            results = Results()
            for part in parts:
                found = results.take(call_stage(self.stages[0], None, part, loss), needs_loss=True)
                torch.autograd.backward(found)
            return results

    def _scheduled(
        self,
        parts: Sequence[Microbatch],
        loss: Loss | None,
        *,
        training: bool,
        watch: _GradientWatch | None = None,
    ) -> Results:
        step = PipelineStep(
            *(self.stages, self.plan, self.group, parts, loss),
            shape=torch.Size(self.hidden_shape(parts[0].tokens.shape)),
            dtype=self.dtype,
            device=self.device,
            training=training,
            stage_is_complete=watch.stage_is_complete if watch else None,
        )
        return step.run(rank_actions(self.plan, self.group.rank, len(parts), training))


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
        if self.pending[parameter] < times:
            # Its reduction over the data-parallel ranks may be under way by now.
            raise RuntimeError(
                f"pipeline: a gradient of shape {list(parameter.shape)} was added to after it was "
                f"announced as complete: more than once in one of {self.microbatches} "
                "micro-batches. Reentrant activation checkpointing does this; it must be the "
                "non-reentrant kind"
            )
        self.pending[parameter] -= times
        if self.pending[parameter] == 0:
            del self.pending[parameter]
            self.ready(parameter)
