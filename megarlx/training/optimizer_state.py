"""What one rank holds for AdamW of n objectives: masters, moments, gradients, and their places.

Everything is of this rank's shard. Which objectives' moments are here depends on who trains them:
all of them, or in a replica one. `Optimizer` is this, and the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megarlx.checkpoint import FROZEN, OPTIMIZER, CheckpointError, FlatShards
from megarlx.comm.collectives import all_reduce_, broadcast_
from megarlx.comm.groups import Group
from megarlx.parallel.data_parallel import DataParallel
from megarlx.training.update_rules import UpdateSettings

SHARED = "shared"  # whose the moments are where all objectives have the same ones


class OptimizerState:
    def __init__(
        self,
        data_parallel: DataParallel,
        settings: Mapping[str, UpdateSettings],
        norm_groups: Sequence[Group],
        *,
        shared_moments: bool = False,
        waiting: Sequence[str] = (),
        frozen: Mapping[str, Tensor] | None = None,
        replicas: Group | None = None,
        local_steps: bool = False,
    ) -> None:
        """`waiting` objectives are not trained, but keep their moments for later; `frozen` shards
        are saved and restored beside the weights (a reference policy's, say)."""
        if not settings:
            raise ValueError("an optimizer needs at least one objective")
        self.data_parallel, self.settings = data_parallel, dict(settings)
        if shared_moments and len(set(self.settings.values())) > 1:
            raise ValueError(f"one Adam cannot have the settings {self.settings}; they differ")
        self.norm_groups, self.shared = tuple(norm_groups), shared_moments
        names = list(self.settings)
        self.replicas = replicas or Group.alone("replica")
        self.trained = names  # on this rank
        if replicas is not None:
            if replicas.size != len(names):
                raise ValueError(
                    f"{len(names)} objectives ({', '.join(names)}) need {len(names)} replicas, one "
                    f"each; the mesh has replica={replicas.size}"
                )
            self.trained = [names[replicas.rank]]
        # Whose the moments are: of all ranks, and of this one.
        self.all_owners = [*([SHARED] if shared_moments else names), *waiting]
        self.owners = [n for n in self.all_owners if n not in names or n in self.trained]
        layout, weights = data_parallel.layout, data_parallel.weights
        size, dtype = layout.shard_size, data_parallel.gradient_dtype
        shard = data_parallel.shard_of_weights()
        self.masters_are_weights = shard is weights and weights.dtype == dtype and not local_steps
        self.master = shard if self.masters_are_weights else shard.to(dtype, copy=True)
        self.weights_out = None if self.masters_are_weights else self._weights_out(shard)

        def zeros() -> Tensor:
            return torch.zeros(size, dtype=dtype, device=weights.device)

        self.exp_avgs = {name: zeros() for name in self.owners}
        self.exp_avg_sqs = {name: zeros() for name in self.owners}
        self.steps = torch.zeros(len(self.owners), dtype=torch.int64, device=weights.device)
        self._places: dict[tuple[str, ...], Tensor] = {}
        # One objective on one rank reduces in place; several must outlive the gradient buffer.
        alone = len(self.trained) == 1 and data_parallel.group.size == 1
        self.gradients = {n: data_parallel.gradients if alone else zeros() for n in self.trained}
        self.locals = {n: self.master.clone() for n in self.trained} if local_steps else {}
        # The same memory at every step for what goes over the replica axis.
        self._delta = zeros() if self._in_replicas and not (shared_moments or local_steps) else None
        self._packed = zeros() if self._in_replicas else None
        self._uncounted = data_parallel.uncounted_ranges()
        # What a checkpoint holds of this rank, under the names that it gets there.
        moments = [("exp_avg", self.exp_avgs), ("exp_avg_sq", self.exp_avg_sqs)]
        self.frozen = dict(frozen or {})
        self.shards = self._shards(
            {"": self.master}
            | {f"{OPTIMIZER}{n}/{k}/": shard[n] for n in self.owners for k, shard in moments}
            | {f"{FROZEN}{name}/": shard for name, shard in self.frozen.items()}
        )

    @property
    def _in_replicas(self) -> bool:
        return self.replicas.size > 1

    def place_of(self, owners: Sequence[str]) -> Tensor:
        """Index of these in `steps`; made once, since the host waits for the device to make it."""
        key = tuple(owners)
        if key not in self._places:
            places = [self.owners.index(owner) for owner in owners]
            self._places[key] = torch.tensor(places, device=self.steps.device)
        return self._places[key]

    def _weights_out(self, shard: Tensor) -> Tensor | None:
        """Where the updated weights are written in the model's type, before they are gathered."""
        whole = shard is self.data_parallel.weights
        if whole:
            return shard
        return None if shard.dtype == self.data_parallel.gradient_dtype else shard

    def _shards(self, shards: Mapping[str, Tensor]) -> FlatShards:
        data_parallel = self.data_parallel
        rank = data_parallel.group.rank
        return FlatShards(data_parallel.layout, data_parallel.layouts, rank, shards)

    def state(self) -> dict[str, Any]:
        """What of a checkpoint is not in `shards`; all ranks call it together."""
        mine = dict(zip(self.owners, self.steps, strict=True))
        none = self.steps.new_zeros(())
        steps = torch.stack([mine.get(owner, none) for owner in self.all_owners])
        all_reduce_(steps, self.replicas, "max")
        return {"steps": dict(zip(self.all_owners, steps.tolist(), strict=True))}

    def starting_shards(self, going_on: Sequence[str]) -> FlatShards:
        """What a run takes over from the run it branches from: weights, and some moments."""
        moments = [("exp_avg", self.exp_avgs), ("exp_avg_sq", self.exp_avg_sqs)]
        return self._shards(
            {"": self.master}
            | {
                f"{OPTIMIZER}{n}/{k}/": shard[n]
                for n in going_on
                if n in self.owners
                for k, shard in moments
            }
        )

    def start(self, going_on: Sequence[str], state: Mapping[str, Any]) -> None:
        """After `starting_shards` were filled."""
        steps = _steps(state, going_on)
        for name in going_on:
            if name in self.owners:
                self.steps[self.owners.index(name)] = steps[name]
        self.weights_from_masters()

    @torch.no_grad()
    def take_masters(self, before: OptimizerState) -> None:
        """Goes on with the weights of another stage's optimizer, in its precision."""
        self.master.copy_(before.master)
        for local in self.locals.values():
            local.copy_(self.master)

    @torch.no_grad()
    def take_moments(self, before: OptimizerState, owner: str) -> None:
        """Goes on with an objective where another stage's optimizer left it, on all ranks."""
        held = owner in before.owners
        count = torch.zeros_like(before.steps[:1])
        if held:
            count.copy_(before.steps[before.owners.index(owner)])
        for mine, theirs in (
            (self.exp_avgs, before.exp_avgs),
            (self.exp_avg_sqs, before.exp_avg_sqs),
        ):
            moment = before.from_owner(theirs[owner] if held else self.master.clone(), owner)
            if owner in self.owners:
                mine[owner].copy_(moment)
        before.from_owner(count, owner)
        if owner in self.owners:
            self.steps[self.owners.index(owner)] = count[0]

    def from_owner(self, tensor: Tensor, owner: str) -> Tensor:
        """In place, on every replica what the replica that trains `owner` has."""
        if self._in_replicas and owner in self.settings:
            broadcast_(tensor, self.replicas, list(self.settings).index(owner))
        return tensor

    def restore(self, state: Mapping[str, Any]) -> None:
        """After `shards` were filled."""
        steps = _steps(state, self.owners)
        self.steps.copy_(torch.tensor([steps[name] for name in self.owners]))
        self.weights_from_masters()

    @torch.no_grad()
    def weights_from_masters(self) -> None:
        """The model's weights again, rounded as a step would round them."""
        for local in self.locals.values():
            local.copy_(self.master)
        self._weights_from(self.master)

    @torch.no_grad()
    def weights_of(self, objective: str) -> None:
        """Puts the weights in place that an objective has come to by itself."""
        if self.locals:
            self._weights_from(self.locals[objective])

    def _weights_from(self, masters: Tensor) -> None:
        if self.weights_out is not None:
            self.weights_out.copy_(masters)
            masters = self.weights_out
        self.data_parallel.gather_weights(masters)

    def gradient_shard(self, objective: str) -> Tensor:
        return self.gradients[objective]


def _steps(state: Mapping[str, Any], owners: Sequence[str]) -> Mapping[str, int]:
    steps = state.get("steps")
    if not isinstance(steps, Mapping) or any(
        type(steps.get(name)) is not int or steps[name] < 0 for name in owners
    ):
        raise CheckpointError(
            f"optimizer steps are {steps!r}; expected one count each of {', '.join(owners)}"
        )
    return steps
