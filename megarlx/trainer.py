"""The one loop. It knows no objective by name; a step reads in order what happens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarlx.checkpoint import WEIGHTS_ONLY, CheckpointError, Loaded, Pause, Saver, load
from megarlx.comm.collectives import all_reduce_
from megarlx.model.build import ParallelModel
from megarlx.objectives.interface import Objective
from megarlx.optimizer import AdamSettings, AveragingAdamW, StepReport

LearningRate = Callable[[int], float]  # step -> learning rate


@dataclass(frozen=True)
class TrainedObjective:
    """An objective with its own optimizer settings and learning-rate schedule."""

    objective: Objective
    adam: AdamSettings
    learning_rate: LearningRate


class Trainer:
    """Trains a model laid out over a mesh on one or several objectives, averaging their updates."""

    def __init__(self, model: ParallelModel, objectives: list[TrainedObjective]) -> None:
        self.model, self.mesh = model, model.mesh
        self.objectives = {o.objective.name: o for o in objectives}
        if len(self.objectives) != len(objectives):
            names = [o.objective.name for o in objectives]
            raise ValueError(f"objectives need different names; given: {', '.join(names)}")
        self.optimizer = AveragingAdamW(
            model.data_parallel,
            {name: o.adam for name, o in self.objectives.items()},
            norm_groups=(model.mesh.tp, model.mesh.pp),
        )
        self.steps_done = 0

    def step(self) -> tuple[dict[str, Tensor], StepReport]:
        """One step; the losses are on the last pipeline stage's ranks, elsewhere zero."""
        self.mesh.traffic.step = self.steps_done
        losses = {
            name: self.forward_backward(trained.objective)
            for name, trained in self.objectives.items()
        }
        report = self.optimizer.step(
            {name: o.learning_rate(self.steps_done) for name, o in self.objectives.items()}
        )
        self.steps_done += 1
        return losses, report

    def forward_backward(self, objective: Objective) -> Tensor:
        """Leaves the objective's reduced gradients in its shard; returns this rank's loss."""
        batch = objective.next_batch()
        data_parallel = self.model.data_parallel
        # The one place where losses are normalised: by what all ranks have together.
        normalizer = all_reduce_(batch.weight, data_parallel.group)
        data_parallel.begin(self.optimizer.gradient_shard(objective.name))
        results = self.model.pipeline.forward_backward(
            {**batch.inputs, "normalizer": normalizer, "loss": objective.loss},
            batch.microbatches,
            on_gradient_ready=data_parallel.ready,
        )
        data_parallel.finish()
        if not results.losses:
            return torch.zeros(1, device=normalizer.device)
        return torch.stack(results.losses).sum(0)

    def save(self, saver: Saver, run: Mapping[str, Any], *, blocking: bool = False) -> Pause:
        """Begins a checkpoint of the steps done; `run` is what the caller wants back on resume."""
        state = {"steps_done": self.steps_done, "optimizer": self.optimizer.state(), "run": run}
        return saver.save(self.steps_done, self.optimizer.shards, state, blocking=blocking)

    def resume(self, checkpoint: Path) -> Loaded:
        """Everything as it was when the checkpoint was saved, in this layout."""
        loaded = load(checkpoint, self.optimizer.shards, self.mesh.world)
        steps, optimizer = loaded.state.get("steps_done"), loaded.state.get("optimizer")
        if type(steps) is not int or not isinstance(optimizer, dict):
            raise CheckpointError(
                f"{checkpoint}: the state has steps_done {steps!r} and optimizer {optimizer!r}; "
                "expected a whole number and an object"
            )
        self.optimizer.restore(optimizer)
        self.steps_done = steps
        return loaded

    def start_from(self, checkpoint: Path) -> Loaded:
        """The weights alone: optimizers and steps begin anew, as an excursion does by default."""
        shards = self.optimizer.weight_shards
        loaded = load(checkpoint, shards, self.mesh.world, ignore=WEIGHTS_ONLY)
        self.optimizer.weights_from_masters()
        return loaded

    @torch.no_grad()
    def evaluate(self, objective: Objective) -> float:
        """The objective's loss on its next batch, the same number on every rank; no update."""
        batch = objective.next_batch()
        normalizer = all_reduce_(batch.weight, self.mesh.dp)
        results = self.model.pipeline.forward_only(
            {**batch.inputs, "normalizer": normalizer, "loss": objective.loss}, batch.microbatches
        )
        loss = torch.zeros(1, device=normalizer.device)
        if results.losses:
            loss = torch.stack(results.losses).sum(0)
        return self.global_loss({objective.name: loss})[objective.name]

    def learning_rate(self, name: str, step: int) -> float:
        return self.objectives[name].learning_rate(step)

    def first_non_finite(self, name: str) -> str | None:
        """The first tensor of this rank's shard whose gradient is not finite."""
        data_parallel, gradient = self.model.data_parallel, self.optimizer.gradient_shard(name)
        for piece, start, block in data_parallel.layout.chunks(
            data_parallel.layouts, data_parallel.group.rank
        ):
            if not torch.isfinite(gradient[start : start + prod(block.size)]).all():
                return piece.name
        return None

    def global_loss(self, losses: Mapping[str, Tensor]) -> dict[str, float]:
        """The same numbers on every rank; waits for the device, so for logging only."""
        together = torch.stack([loss.double().reshape(()) for loss in losses.values()])
        all_reduce_(all_reduce_(together, self.mesh.dp), self.mesh.pp)
        return dict(zip(losses, together.tolist(), strict=True))
