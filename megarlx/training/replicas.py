"""What replicas tell each other: in a stage each of them may train another objective."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from megarlx.comm.collectives import all_reduce_, barrier, gather_values
from megarlx.comm.groups import Group, Mesh
from megarlx.objectives.interface import Objective
from megarlx.training.stages import TrainingStage


class Replicas:
    """Seen from one rank; `enter` says which stage it is in."""

    def __init__(
        self, mesh: Mesh, objectives: Mapping[str, Objective], device: torch.device
    ) -> None:
        self.mesh, self.objectives, self._device = mesh, objectives, device
        # Tokens each was trained on in this run, on all ranks; on the device, where no step waits.
        self.tokens = {
            name: torch.zeros((), dtype=torch.float64, device=device) for name in objectives
        }
        self._stage: TrainingStage | None = None
        self._waited = 0.0  # seconds, for other replicas

    def enter(self, stage: TrainingStage) -> None:
        self._stage = stage
        self.deal(stage)

    def deal(self, stage: TrainingStage) -> None:
        training_group = self.trainers_in(stage)
        generation_group = self.mesh.data if stage.helps else training_group
        for trained in stage.members.values():
            trained.objective.set_groups(training_group, generation_group)

    def trainers_in(self, stage: TrainingStage) -> Group:
        """Who shares out an objective's batches."""
        return self.mesh.dp if stage.in_replicas else self.mesh.data

    @property
    def _apart(self) -> bool:
        return self._stage is not None and self._stage.in_replicas

    def trains(self, name: str) -> bool:
        """Whether this replica trains an objective of the stage, or it is of another stage."""
        assert self._stage is not None
        names = list(self._stage.members)
        return not self._apart or name not in names or names.index(name) == self.mesh.replica.rank

    def told(self, mine: dict[str, Any]) -> dict[str, Any]:
        """What each replica has to say of the objectives that it trains, on every rank."""
        if self.mesh.replica.size == 1:
            return mine
        return {k: v for part in gather_values(mine, self.mesh.replica) for k, v in part.items()}

    def wait(self) -> None:
        """Before the exchange, to know how long it takes until all are there."""
        if self._device.type == "cuda":
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
        if not self._apart:
            return {}
        all_reduce_(waited, self.mesh.world)
        return {"perf/idle_share": float(waited) / self.mesh.world.size / seconds}

    def metrics(self, names: Iterable[str]) -> dict[str, float]:
        """The objectives' own, on every rank."""
        mine: dict[str, float] = {}
        for name in names:
            if self.trains(name):
                mine |= self.objectives[name].metrics()
        return self.told(mine)

    def new_examples(self, names: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
        """New samples for the log. Each is returned once, on the first rank of each replica."""
        found = {name: self.objectives[name].new_examples() for name in names}
        return self.told({name: examples for name, examples in found.items() if examples})

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

    def states(self) -> dict[str, Any]:
        """Of all objectives, on every rank."""
        mine = {name: one.state() for name, one in self.objectives.items() if self.trains(name)}
        every = self.told(mine) if self._apart else mine
        return {name: every[name] for name in self.objectives}

    def level(self) -> None:
        """At a stage's end: every replica knows all objectives as those left them that trained
        them."""
        if not self._apart:
            return
        self.share_counts()
        for name, state in self.states().items():
            if not self.trains(name):
                self.objectives[name].load_state(state)
