"""The one loop. It knows no objective by name; a step reads in order what happens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarlx.checkpoint import Loaded, Pause, Saver
from megarlx.comm.collectives import all_reduce_
from megarlx.config.timeline import Timeline
from megarlx.model.build import ParallelModel
from megarlx.objectives.interface import Objective
from megarlx.training import run_state
from megarlx.training.captured import CapturedMicrobatches, is_small, why_eager
from megarlx.training.moving_average import MovingAverage
from megarlx.training.optimizer import SHARED, Optimizer, StepReport
from megarlx.training.parts import first_non_finite
from megarlx.training.replicas import Replicas
from megarlx.training.stages import (
    TrainedObjective,
    TrainingStage,
    check_stages,
    settings_of_waiting,
)
from megarlx.training.whole_tensors import WholeTensors

__all__ = ["TrainedObjective", "Trainer", "TrainingStage"]


class Trainer:
    """Trains a model laid out over a mesh, stage after stage, combining objectives' updates."""

    def __init__(
        self,
        model: ParallelModel,
        stages: Sequence[TrainingStage],
        average_decay: float | None = None,
        *,
        capture_below_parameters: int = 0,
    ) -> None:
        """`average_decay` of the moving average of weights; None: there is none. A model on a GPU
        with fewer than `capture_below_parameters` trains its micro-batches as CUDA graphs, where an
        objective allows it."""
        self.model, self.mesh = model, model.mesh
        self.stages = list(stages)
        self.timeline = Timeline([stage.times for stage in stages])
        self.steps_done = 0
        self.objectives = check_stages(stages)
        # Steps that each objective has taken on its learning-rate course.
        self.positions = dict.fromkeys(self.objectives, 0)
        self.last_rates: dict[str, float] = {}
        self.last_shares: dict[str, float] | None = None
        self.replicas = Replicas(self.mesh, self.objectives, model.pipeline.device)
        self.tokens = self.replicas.tokens
        for stage in stages:  # what cannot be dealt out is found before the first step
            self.replicas.deal(stage)
        self.average = None if average_decay is None else MovingAverage(model, average_decay)
        self.notices: list[str] = []  # what there is to say; who reads it empties it
        self.captured = self._capture(capture_below_parameters)
        self._untouched = {name: one.state() for name, one in self.objectives.items()}
        self.enter(0)

    @property
    def stage(self) -> TrainingStage:
        return self.stages[self.stage_index]

    @property
    def step_in_stage(self) -> int:
        return self.steps_done - self.timeline.begin_of(self.stage_index)

    @property
    def in_sync(self) -> bool:
        """Whether the steps done end with an average: only then is there one set of weights."""
        at = self.step_in_stage
        return at == 0 or self.stage.times.averages_at(at - 1)

    def step(self) -> tuple[dict[str, Tensor], StepReport]:
        """One step; the losses are on the last pipeline stage's ranks, elsewhere zero."""
        self.mesh.traffic.step = self.steps_done
        self._enter_next_stage()
        stage, at = self.stage, self.step_in_stage
        active, average = stage.times.trained_at(at), stage.times.averages_at(at)
        if stage.helps:
            for name in active:
                self.objectives[name].prepare()
        losses = {
            name: self.forward_backward(self.objectives[name])
            if name in self.optimizer.trained
            else torch.zeros(1, device=self.model.pipeline.device)
            for name in active
        }
        self.last_rates = {name: self.learning_rate(name) for name in active}
        self.last_shares = stage.shares_at(at)
        if stage.in_replicas:
            self.replicas.wait()
        report = self.optimizer.step(self.last_rates, self.last_shares, average=average)
        if average and self.average is not None:
            self.average.follow(self.optimizer.master)
        if stage.adapts and average:
            signals = {name: self.objectives[name].signal() for name in self.optimizer.trained}
            stage.observe(self.replicas.told(signals), self.global_loss(losses))
        for name in active:
            self.positions[name] += 1
        self.steps_done += 1
        return losses, report

    def forward_backward(self, objective: Objective) -> Tensor:
        """Leaves the objective's reduced gradients in its shard; returns this rank's loss."""
        self.optimizer.masters.to_weights_of(objective.name)
        batch = objective.next_batch()
        data_parallel = self.model.data_parallel
        # The one place where losses are normalised: by what all ranks have together.
        both = torch.stack((batch.weight, torch.full_like(batch.weight, batch.tokens)))
        training_group = self.replicas.trainers_in(self.stage)
        normalizer, tokens = all_reduce_(both, training_group).unbind()
        self.tokens[objective.name] += tokens
        shard = self.optimizer.gradient_shard(objective.name)
        graphs = self.captured.get(objective.name)
        if graphs is not None and (said := graphs.prepare(batch.microbatches, normalizer)):
            self.notices.append(said)
        data_parallel.begin(shard)
        if graphs is None or not graphs.are_there:
            results = self.model.pipeline.forward_backward(
                batch.microbatches,
                partial(objective.loss, normalizer=normalizer),
                on_gradient_ready=data_parallel.ready if data_parallel.reduces_early else None,
            )
        else:
            results = graphs.forward_backward(batch.microbatches, normalizer)
        data_parallel.finish()
        if not self.stage.in_replicas:
            all_reduce_(shard, self.mesh.replica)  # where replicas have nothing else to be
        return _total(results.losses, normalizer)

    def _capture(self, below: int) -> dict[str, CapturedMicrobatches]:
        """By objective, of those that can be captured; the others are named."""
        found: dict[str, CapturedMicrobatches] = {}
        if not is_small(self.model, below):
            return found
        for name, objective in self.objectives.items():
            if why := why_eager(self.model, objective):
                self.notices.append(f"{name}: no CUDA graphs, since {why}")
            else:
                found[name] = CapturedMicrobatches(self.model.pipeline, objective)
        return found

    # From stage to stage.

    def enter(self, index: int) -> None:
        """Makes the optimizer of a stage; what it goes on with is not in it yet."""
        self.stage_index = index
        stage = self.stage
        self.replicas.enter(stage)
        waiting = sorted(self.timeline.waiting(index))
        data_parallel = self.model.data_parallel
        continued = {name: trained.inherit for name, trained in stage.members.items()}
        frozen: dict[str, Tensor] = {}
        for name, inherit in {**continued, **dict.fromkeys(waiting, True)}.items():
            kept = self.objectives[name].begin(data_parallel.shard_of_weights(), inherit)
            if kept is not None:
                frozen[name] = kept
        self.optimizer = Optimizer(
            data_parallel,
            {name: trained.settings for name, trained in stage.members.items()},
            norm_groups=(self.mesh.tp, self.mesh.pp),
            shared_moments=stage.shared_moments,
            combination=stage.combination,
            waiting={name: settings_of_waiting(self.stages, index, name) for name in waiting},
            frozen=frozen,
            average=None if self.average is None else self.average.shard,
            replicas=self.mesh.replica if stage.in_replicas else None,
            local_steps=stage.times.sync_every > 1,
            outer=stage.outer,
            protected={
                name: one.protected
                for name, one in stage.members.items()
                if one.protected is not None
            },
            whole_tensors=partial(WholeTensors.of, self.model),
        )

    def _enter_next_stage(self) -> None:
        """A checkpoint between two stages is the end of the first: this happens on the way in."""
        steps = self.stage.times.steps
        if steps is None or self.step_in_stage < steps:
            return
        if self.stage_index + 1 == len(self.stages):
            raise ValueError(f"training: all {self.steps_done} steps of the stages are done")
        before, index = self.optimizer, self.stage_index + 1
        self.replicas.level()
        for name, trained in self.stages[index].members.items():
            if not trained.inherit:
                self.positions[name] = 0
                self.objectives[name].load_state(self._untouched[name])
        self.enter(index)
        here = self.stage.times.going_on
        going_on = {*here, *self.timeline.waiting(index)}
        if self.stage.shared_moments and here:
            going_on.add(SHARED)
        self.optimizer.take_over(before, sorted(going_on))

    # Checkpoints.

    def save(self, saver: Saver, run: Mapping[str, Any], *, blocking: bool = False) -> Pause:
        """Begins a checkpoint of the steps done; `run` is what the caller wants back on resume."""
        return run_state.save(self, saver, run, blocking=blocking)

    def resume(self, checkpoint: Path) -> Loaded:
        """Everything as it was when the checkpoint was saved, in this layout."""
        return run_state.resume(self, checkpoint)

    def start_from(self, checkpoint: Path, weights: str = "") -> Loaded:
        """An excursion's start: the weights, and what its objectives go on with, no more.

        weights   what the names of those tensors begin with
        """
        return run_state.start_from(self, checkpoint, weights)

    # What a log asks.

    @torch.no_grad()
    def evaluate(self, objective: Objective) -> float:
        """The objective's loss on its next batch, the same number on every rank; no update."""
        batch = objective.next_batch()
        normalizer = all_reduce_(batch.weight, self.mesh.data)
        results = self.model.pipeline.forward_only(
            batch.microbatches, partial(objective.loss, normalizer=normalizer)
        )
        loss = _total(results.losses, normalizer)
        return self.global_loss({objective.name: loss})[objective.name]

    def learning_rate(self, name: str) -> float:
        """Of the objective's next step."""
        return self.stage.members[name].learning_rate(self.positions[name])

    def first_non_finite(self, name: str) -> str | None:
        """The first tensor of this rank's shard whose gradient is not finite."""
        if name not in self.optimizer.trained:
            return None
        return first_non_finite(self.model.data_parallel, self.optimizer.gradient_shard(name))

    def global_loss(self, losses: Mapping[str, Tensor]) -> dict[str, float]:
        """The same numbers on every rank; waits for the device, so for logging only."""
        together = torch.stack([loss.double().reshape(()) for loss in losses.values()])
        all_reduce_(all_reduce_(together, self.mesh.data), self.mesh.pp)
        return dict(zip(losses, together.tolist(), strict=True))


def _total(losses: Sequence[Tensor], like: Tensor) -> Tensor:
    """[1], of all micro-batches; 0 where another rank has the last stage."""
    return torch.stack(list(losses)).sum(0) if losses else torch.zeros(1, device=like.device)
