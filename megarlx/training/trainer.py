"""The one loop. It knows no objective by name; a step reads in order what happens."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarlx.checkpoint import (
    FROZEN,
    OPTIMIZER,
    CheckpointError,
    Loaded,
    Pause,
    Saver,
    load,
    read_manifest,
)
from megarlx.comm.collectives import all_reduce_, barrier, gather_values
from megarlx.comm.groups import Group
from megarlx.config.timeline import Timeline
from megarlx.model.build import ParallelModel
from megarlx.objectives.interface import Objective, Work
from megarlx.training.optimizer import SHARED, Optimizer, StepReport
from megarlx.training.stages import TrainedObjective, TrainingStage

__all__ = ["TrainedObjective", "Trainer", "TrainingStage"]


class Trainer:
    """Trains a model laid out over a mesh, stage after stage, averaging objectives' updates."""

    def __init__(self, model: ParallelModel, stages: Sequence[TrainingStage]) -> None:
        self.model, self.mesh = model, model.mesh
        self.stages = list(stages)
        self.timeline = Timeline([stage.times for stage in stages])
        self.steps_done = 0
        self.objectives: dict[str, Objective] = {}
        for stage in stages:
            for name, trained in stage.members.items():
                if self.objectives.setdefault(name, trained.objective) is not trained.objective:
                    raise ValueError(f"two objectives have the name '{name}'")
        # Steps that each objective has taken on its learning-rate course.
        self.positions = dict.fromkeys(self.objectives, 0)
        # Tokens each was trained on in this run, on all ranks; on the device, where no step waits.
        self.tokens = {
            name: torch.zeros((), dtype=torch.float64, device=model.pipeline.device)
            for name in self.objectives
        }
        self.last_rates: dict[str, float] = {}
        self.last_shares: dict[str, float] | None = None
        self._waited = 0.0  # seconds, for other replicas
        for stage in stages:  # what cannot be dealt out is found before the first step
            self._deal(stage)
        self._untouched = {name: one.state() for name, one in self.objectives.items()}
        self.stage_index, self.optimizer = 0, self._optimizer_of(0)

    @property
    def stage(self) -> TrainingStage:
        return self.stages[self.stage_index]

    @property
    def step_in_stage(self) -> int:
        return self.steps_done - self.timeline.begin_of(self.stage_index)

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
            self._wait_for_replicas()
        report = self.optimizer.step(self.last_rates, self.last_shares, average=average)
        if stage.adapts and average:
            signals = {name: self.objectives[name].signal() for name in self.optimizer.trained}
            stage.observe(self._of_replicas(signals), self.global_loss(losses))
        for name in active:
            self.positions[name] += 1
        self.steps_done += 1
        return losses, report

    def forward_backward(self, objective: Objective) -> Tensor:
        """Leaves the objective's reduced gradients in its shard; returns this rank's loss."""
        self.optimizer.weights_of(objective.name)
        batch = objective.next_batch()
        data_parallel = self.model.data_parallel
        # The one place where losses are normalised: by what all ranks have together.
        both = torch.stack((batch.weight, torch.full_like(batch.weight, batch.tokens)))
        normalizer, tokens = all_reduce_(both, self._trainers_in(self.stage)).unbind()
        self.tokens[objective.name] += tokens
        shard = self.optimizer.gradient_shard(objective.name)
        data_parallel.begin(shard)
        results = self.model.pipeline.forward_backward(
            batch.microbatches,
            partial(objective.loss, normalizer=normalizer),
            on_gradient_ready=data_parallel.ready,
        )
        data_parallel.finish()
        if not self.stage.in_replicas:
            all_reduce_(shard, self.mesh.replica)  # where replicas have nothing else to be
        if not results.losses:
            return torch.zeros(1, device=normalizer.device)
        return torch.stack(results.losses).sum(0)

    # Replicas, each of which trains one objective of a stage.

    def _trainers_in(self, stage: TrainingStage) -> Group:
        """Who shares out an objective's batches."""
        return self.mesh.dp if stage.in_replicas else self.mesh.data

    def _deal(self, stage: TrainingStage) -> None:
        trainers = self._trainers_in(stage)
        makers = self.mesh.data if stage.helps else trainers
        for trained in stage.members.values():
            trained.objective.deal_over(trainers, makers)

    @property
    def _elsewhere(self) -> set[str]:
        """Objectives that other replicas train in this stage."""
        return set(self.stage.members) - set(self.optimizer.trained)

    def _of_replicas(self, mine: dict[str, Any]) -> dict[str, Any]:
        """What each replica has to say of the objectives that it trains, on every rank."""
        if self.mesh.replica.size == 1:
            return mine
        return {k: v for part in gather_values(mine, self.mesh.replica) for k, v in part.items()}

    def _wait_for_replicas(self) -> None:
        """Before the exchange, to know how long it takes until all are there."""
        if self.model.pipeline.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        begun = time.perf_counter()
        barrier(self.mesh.replica)
        self._waited += time.perf_counter() - begun

    def take_waited_seconds(self) -> float:
        """What this rank has waited for other replicas since the last call."""
        waited, self._waited = self._waited, 0.0
        for objective in self.objectives.values():
            waited, objective.waited_seconds = waited + objective.waited_seconds, 0.0
        return waited

    def idle_share(self, seconds: float) -> dict[str, float]:
        """The share of the last `seconds`, those since the last call, that ranks waited for other
        replicas on average; nothing where there are none."""
        waited = torch.tensor([self.take_waited_seconds()], dtype=torch.float64)
        if not self.stage.in_replicas:
            return {}
        all_reduce_(waited, self.mesh.world)
        return {"perf/idle_share": float(waited) / self.mesh.world.size / seconds}

    def metrics(self, names: Iterable[str]) -> dict[str, float]:
        """The objectives' own, on every rank."""
        mine: dict[str, float] = {}
        for name in names:
            if name not in self._elsewhere:
                mine |= self.objectives[name].metrics()
        return self._of_replicas(mine)

    def new_examples(self, names: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
        """Samples to be shown, each once, on the ranks whose coordinates are otherwise 0."""
        found = {name: self.objectives[name].new_examples() for name in names}
        return self._of_replicas({name: examples for name, examples in found.items() if examples})

    def share_counts(self) -> None:
        """Every rank counts what it does itself; afterwards all know tokens and work of all."""
        if self.mesh.replica.size == 1:
            return
        names = list(self.objectives)
        works = [self.objectives[name].work for name in names]
        rows = [
            torch.stack([self.tokens[name].cpu() for name in names]),
            torch.tensor([work.generated_tokens for work in works], dtype=torch.float64),
            torch.tensor([work.forward_tokens for work in works], dtype=torch.float64),
        ]
        table = all_reduce_(torch.stack(rows), self.mesh.replica, "max")
        for name, work, (tokens, generated, forward) in zip(
            names, works, table.T.tolist(), strict=True
        ):
            self.tokens[name].fill_(tokens)
            work.generated_tokens, work.forward_tokens = generated, forward

    def _states(self) -> dict[str, Any]:
        """Of all objectives, on every rank."""
        mine = {n: one.state() for n, one in self.objectives.items() if n not in self._elsewhere}
        every = self._of_replicas(mine) if self._elsewhere else mine
        return {name: every[name] for name in self.objectives}

    @property
    def in_sync(self) -> bool:
        """Whether the steps done end with an average: only then is there one set of weights."""
        at = self.step_in_stage
        return at == 0 or self.stage.times.averages_at(at - 1)

    # From stage to stage.

    def _enter_next_stage(self) -> None:
        """A checkpoint between two stages is the end of the first: this happens on the way in."""
        steps = self.stage.times.steps
        if steps is None or self.step_in_stage < steps:
            return
        if self.stage_index + 1 == len(self.stages):
            raise ValueError(f"training: all {self.steps_done} steps of the stages are done")
        before = self.optimizer
        if self.stage.in_replicas:
            self.share_counts()
            for name, state in self._states().items():
                if name not in before.trained:
                    self.objectives[name].load_state(state)
        self.stage_index += 1
        for name, trained in self.stage.members.items():
            if not trained.goes_on:
                self.positions[name] = 0
                self.objectives[name].load_state(self._untouched[name])
        self.optimizer = self._optimizer_of(self.stage_index)
        here = self.stage.times.going_on
        going_on = {*here, *self.timeline.waiting(self.stage_index)}
        if self.stage.shared_moments and here:
            going_on.add(SHARED)
        self.optimizer.take_masters(before)
        for name in sorted(going_on & set(before.all_owners) & set(self.optimizer.all_owners)):
            self.optimizer.take_moments(before, name)

    def _optimizer_of(self, index: int) -> Optimizer:
        stage = self.stages[index]
        self._deal(stage)
        waiting = sorted(self.timeline.waiting(index))
        data_parallel = self.model.data_parallel
        goes_on = {name: trained.goes_on for name, trained in stage.members.items()}
        frozen: dict[str, Tensor] = {}
        for name, continued in {**goes_on, **dict.fromkeys(waiting, True)}.items():
            kept = self.objectives[name].begin(data_parallel.shard_of_weights(), continued)
            if kept is not None:
                frozen[name] = kept
        return Optimizer(
            data_parallel,
            {name: trained.settings for name, trained in stage.members.items()},
            norm_groups=(self.mesh.tp, self.mesh.pp),
            shared_moments=stage.shared_moments,
            waiting=waiting,
            frozen=frozen,
            replicas=self.mesh.replica if stage.in_replicas else None,
            local_steps=stage.times.sync_every > 1,
        )

    # Checkpoints.

    def save(self, saver: Saver, run: Mapping[str, Any], *, blocking: bool = False) -> Pause:
        """Begins a checkpoint of the steps done; `run` is what the caller wants back on resume."""
        if not self.in_sync:
            raise ValueError(
                f"checkpoint: step {self.steps_done} is {self.step_in_stage} steps into its stage, "
                f"between two averages; allowed are multiples of {self.stage.times.sync_every}"
            )
        self.share_counts()
        state = {
            "steps_done": self.steps_done,
            "stage": self.stage_index,
            "positions": dict(self.positions),
            "tokens": {name: int(tokens) for name, tokens in self.tokens.items()},
            "work": {name: asdict(one.work) for name, one in self.objectives.items()},
            "optimizer": self.optimizer.state(),
            "objectives": self._states(),
            "shares": self.stage.state(),
            "run": run,
        }
        return saver.save(self.steps_done, self.optimizer.shards, state, blocking=blocking)

    def resume(self, checkpoint: Path) -> Loaded:
        """Everything as it was when the checkpoint was saved, in this layout."""
        state = read_manifest(checkpoint).state
        index, steps = state.get("stage"), state.get("steps_done")
        if type(index) is not int or not 0 <= index < len(self.stages) or type(steps) is not int:
            raise CheckpointError(
                f"{checkpoint}: the state has stage {index!r} and steps_done {steps!r}; expected "
                f"whole numbers, the stage below {len(self.stages)}"
            )
        if index != self.stage_index:
            self.stage_index, self.optimizer = index, self._optimizer_of(index)
        loaded = load(checkpoint, self.optimizer.shards, self.mesh.world)
        self._restore(loaded, self.objectives)
        for name, tokens in _part(loaded, "tokens").items():
            self.tokens[name].fill_(tokens)
        for name, work in _part(loaded, "work").items():
            self.objectives[name].work = Work(**work)
        self.optimizer.restore(_part(loaded, "optimizer"))
        self.stage.load_state(_part(loaded, "shares"))
        self.steps_done = steps
        return loaded

    def start_from(self, checkpoint: Path) -> Loaded:
        """An excursion's start: the weights, and what its objectives go on with, no more."""
        going_on = sorted(self.timeline.from_before)
        manifest = read_manifest(checkpoint)
        held = {name.split("/")[1] for name in manifest.tensors if name.startswith(OPTIMIZER)}
        if missing := [name for name in going_on if name not in held]:
            raise CheckpointError(
                f"{checkpoint}: holds no moments of {', '.join(missing)} to go on with; it has "
                f"those of {', '.join(sorted(held)) or 'no objective'}"
            )
        ignore = [FROZEN, *(f"{OPTIMIZER}{name}/" for name in held if name not in going_on)]
        shards = self.optimizer.starting_shards(going_on)
        loaded = load(checkpoint, shards, self.mesh.world, ignore=ignore)
        self._restore(loaded, going_on)
        self.optimizer.start(going_on, _part(loaded, "optimizer"))
        # What was kept of the weights was kept before these were there.
        for shard in self.optimizer.frozen.values():
            shard.copy_(self.model.data_parallel.shard_of_weights())
        return loaded

    def _restore(self, loaded: Loaded, names: Iterable[str]) -> None:
        positions, states = _part(loaded, "positions"), _part(loaded, "objectives")
        for name in names:
            if name not in states or name not in positions:
                raise CheckpointError(f"{loaded.path}: its state has nothing about '{name}'")
            self.objectives[name].load_state(states[name])
            self.positions[name] = int(positions[name])

    @torch.no_grad()
    def evaluate(self, objective: Objective) -> float:
        """The objective's loss on its next batch, the same number on every rank; no update."""
        batch = objective.next_batch()
        normalizer = all_reduce_(batch.weight, self.mesh.data)
        results = self.model.pipeline.forward_only(
            batch.microbatches, partial(objective.loss, normalizer=normalizer)
        )
        loss = torch.zeros(1, device=normalizer.device)
        if results.losses:
            loss = torch.stack(results.losses).sum(0)
        return self.global_loss({objective.name: loss})[objective.name]

    def learning_rate(self, name: str) -> float:
        """Of the objective's next step."""
        return self.stage.members[name].learning_rate(self.positions[name])

    def first_non_finite(self, name: str) -> str | None:
        """The first tensor of this rank's shard whose gradient is not finite."""
        if name not in self.optimizer.trained:
            return None
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
        all_reduce_(all_reduce_(together, self.mesh.data), self.mesh.pp)
        return dict(zip(losses, together.tolist(), strict=True))


def _part(loaded: Loaded, key: str) -> dict[str, Any]:
    value = loaded.state.get(key)
    if not isinstance(value, dict):
        raise CheckpointError(f"{loaded.path}: the state's {key} is {value!r}; expected an object")
    return value
