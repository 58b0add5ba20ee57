"""The optimizer of one rank: ZeRO-1 over n objectives, each with an update rule of its own.

Every objective has its own state, step count, clip factor and share; n = 1 is ordinary training.
The master weights are fp32 (fp64 in fp64 runs) and exist for the shard only; where the model
computes in that same type on one data-parallel rank, they are the weights themselves.

With `shared_moments` the objectives' gradients are combined instead of their updates: one rule.

Two things may differ from "every rank, every step". With `replicas` each rank trains one of the
objectives and has only its state; what the replicas made is combined over that axis, so that the
masters stay the same bits everywhere. With `local_steps` each objective moves its own copy of the
masters. A step with `average=True` combines the differences copy - master and adds them to the
master. Until then `master` is the last average.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megarlx.checkpoint import AVERAGE, FROZEN, FlatShards
from megarlx.comm.collectives import all_reduce_, broadcast_
from megarlx.comm.groups import Group
from megarlx.ops.averaging import average_adamw_
from megarlx.parallel.data_parallel import DataParallel
from megarlx.training.combine import Combination, Combiner, weighted_sum, without_skipped
from megarlx.training.masters import Masters
from megarlx.training.outer import Outer, OuterSteps
from megarlx.training.parts import Parts, Range, UpdateSettings, kinds, with_wholes
from megarlx.training.rule_states import RuleStates
from megarlx.training.sums import ModelSums
from megarlx.training.update_rules import AdamW
from megarlx.training.whole_tensors import Wanted, WholeTensors

SHARED = "shared"  # whose the state is where all objectives have the same one


@dataclass(frozen=True)
class StepReport:
    """Of one optimizer step, on the device: read it when logging, not in between."""

    gradient_norms: dict[str, Tensor]
    found_inf: dict[str, Tensor]


class Optimizer:
    """`gradient_shard(objective)` is where an objective's reduced gradients go; `step` then clips,
    makes all updates from one snapshot, applies their combination and gathers the weights."""

    def __init__(
        self,
        data_parallel: DataParallel,
        settings: Mapping[str, UpdateSettings],
        norm_groups: Sequence[Group],
        *,
        shared_moments: bool = False,
        combination: Combination = weighted_sum,
        waiting: Mapping[str, UpdateSettings] | None = None,
        frozen: Mapping[str, Tensor] | None = None,
        average: Tensor | None = None,
        replicas: Group | None = None,
        local_steps: bool = False,
        outer: Outer | None = None,
        protected: Mapping[str, Tensor] | None = None,
        whole_tensors: Callable[[Wanted], WholeTensors] | None = None,
    ) -> None:
        """`waiting` objectives are not trained, but keep their state for later; `frozen` shards
        are saved and restored beside the weights (a reference policy's, say), as is the weights'
        `average`. `outer` is for local steps. What is `protected`, an objective's bool [P], its
        updates leave alone."""
        if not settings:
            raise ValueError("an optimizer needs at least one objective")
        self.data_parallel, self.settings = data_parallel, dict(settings)
        if shared_moments and len(set(self.settings.values())) > 1:
            raise ValueError(f"one state cannot have the settings {self.settings}; they differ")
        self.shared = shared_moments
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
        self.masters = Masters(data_parallel, self.trained, local_steps=local_steps)
        self.master = self.masters.common
        self.sums = ModelSums(data_parallel, norm_groups)
        # Whose the states are: of all ranks, and of this one.
        owned = {SHARED: self.settings[names[0]]} if shared_moments else self.settings
        every = {**owned, **(waiting or {})}
        here = [n for n in every if n not in names or n in self.trained]
        self.kept = RuleStates(every, here, self.master)
        self.owners, self.steps = self.kept.owners, self.kept.steps
        # One objective on one rank reduces in place; several must outlive the gradient buffer.
        alone = len(self.trained) == 1 and data_parallel.group.size == 1
        made = data_parallel.gradients if alone else None
        self.gradients = {
            n: torch.zeros_like(self.master) if made is None else made for n in self.trained
        }
        self.combiner = Combiner(
            combination,
            names,
            self.replicas,
            self.master,
            of_gradients=shared_moments,
            local_steps=local_steps,
            dot=self.sums.dot,
        )
        apart = not all(one.decay_embeddings for one in self.settings.values())
        self._kinds = list(kinds(data_parallel, embedding_apart=apart))
        self._parts = {
            owner: self._parts_of(owner, whole_tensors) for owner in here if owner in owned
        }
        self.frozen, self.protected = dict(frozen or {}), dict(protected or {})
        self.outer = None if outer is None else OuterSteps(outer, self.master)
        momentum = {} if self.outer is None else self.outer.named()
        # What a checkpoint holds of this rank, under the names that it gets there.
        self.shards = self._shards(
            {"": self.master}
            | dict(self.kept.named(here))
            | momentum
            | {f"{FROZEN}{name}/": shard for name, shard in self.frozen.items()}
            | ({} if average is None else {AVERAGE: average})
        )

    def _shards(self, shards: Mapping[str, Tensor]) -> FlatShards:
        data_parallel = self.data_parallel
        rank = data_parallel.group.rank
        return FlatShards(data_parallel.layout, data_parallel.layouts, rank, shards)

    def _parts_of(self, owner: str, made: Callable[[Wanted], WholeTensors] | None) -> Parts:
        settings, rule = self.kept.settings[owner], self.kept.rules[owner]
        ranges = [Range(part, settings.decay_of(kind)) for part, kind in self._kinds]
        if type(rule) is AdamW:
            return Parts(self.master, ranges)
        assert made is not None  # only optimizers outside a trainer have no model
        wholes = made(rule.whole)
        return Parts(self.master, with_wholes(ranges, wholes.ranges()), wholes)

    # Steps.

    @torch.no_grad()
    def step(
        self,
        learning_rates: Mapping[str, float],
        weights: Mapping[str, float] | None = None,
        *,
        average: bool = True,
    ) -> StepReport:
        """One update by the objectives that `learning_rates` names; the others stay as they are.

        `weights` of their updates (default: equal, summing to one). Without `average`, which is for
        local steps, each objective's own master moves and nothing else.
        """
        active = [name for name in self.settings if name in learning_rates]
        names = [name for name in active if name in self.trained]
        shares = weights or {name: 1.0 / len(active) for name in active}
        norms = self.sums.norms([self.gradients[name] for name in names])
        found_inf = ~torch.isfinite(norms)
        report = self._report(active, names, norms, found_inf)
        if self.masters.locals:
            for at, name in enumerate(names):
                one = slice(at, at + 1)
                rates = {name: learning_rates[name]}
                self._move([name], [name], norms[one], found_inf[one], rates, {name: 1.0})
            if average:
                before = None if self.outer is None else self.master.clone()
                self._average_locals(shares)
                if self.outer is not None and before is not None:
                    self.outer.move_(self.master, before)
                self.masters.to_weights()
            return report
        if self.shared:
            self._update_shared(names, found_inf, report, learning_rates, shares)
        elif self.combiner.linear and not self.combiner.in_replicas:
            self._move(names, names, norms, found_inf, learning_rates, shares)
        else:
            self._update_together(names, norms, found_inf, report, learning_rates, shares)
        self.masters.gather()
        return report

    def weight_norm(self) -> float:
        """Of all master weights, as they were averaged last; called by all ranks, and waits."""
        return float(self.sums.norms([self.master]))

    def _report(
        self, active: Sequence[str], names: Sequence[str], norms: Tensor, found_inf: Tensor
    ) -> StepReport:
        """Of all active objectives, on every rank."""
        if self.combiner.in_replicas:
            mine = torch.stack((norms, found_inf.to(norms.dtype)))
            table = mine.new_zeros(2, len(active))
            for at, name in enumerate(names):
                table[:, active.index(name)] = mine[:, at]
            norms, flags = all_reduce_(table, self.replicas).unbind()
            found_inf = flags != 0
        return StepReport(
            dict(zip(active, norms, strict=True)), dict(zip(active, found_inf, strict=True))
        )

    def _update_shared(
        self,
        names: Sequence[str],
        found_inf: Tensor,
        report: StepReport,
        learning_rates: Mapping[str, float],
        shares: Mapping[str, float],
    ) -> None:
        """One rule for the combination of the gradients."""
        mine = {name: self.gradients[name] for name in names}
        first = names[0]
        if self.combiner.linear:
            self.combiner.mix_linear_(mine, shares, found_inf)
        else:
            every = self.combiner.together(mine)
            mixed = self.combiner.checked(every, [shares[name] for name in report.found_inf])
            mine[first].copy_(mixed)
        # What is mixed cannot be taken apart: one that is not finite skips the step.
        skip = torch.stack(list(report.found_inf.values())).any(0, keepdim=True)
        rate = learning_rates[next(iter(report.found_inf))]  # the same for all
        norms = self.sums.norms([mine[first]])
        self._move([first], [SHARED], norms, skip, {first: rate}, {first: 1.0})

    def _update_together(
        self,
        names: Sequence[str],
        norms: Tensor,
        found_inf: Tensor,
        report: StepReport,
        learning_rates: Mapping[str, float],
        shares: Mapping[str, float],
    ) -> None:
        """The updates by themselves, and then their combination."""
        deltas = {}
        for at, name in enumerate(names):
            one, room = slice(at, at + 1), self.combiner.room(name)
            rate = learning_rates[name]
            deltas[name] = self._delta(name, name, norms[one], found_inf[one], rate, room)
        if self.combiner.linear:
            self.combiner.add_linear_(self.master, deltas, shares, found_inf, self.masters.out)
            return
        every = dict(zip(report.found_inf, self.combiner.together(deltas), strict=True))
        combined = self.combiner.combined(without_skipped(every, report.found_inf), shares)
        if combined is not None:
            self.masters.add_(combined)

    def _average_locals(self, shares: Mapping[str, float]) -> None:
        """The combination of the ways that the objectives went since they were last together."""
        ways = {name: local.sub_(self.master) for name, local in self.masters.locals.items()}
        if self.combiner.linear:
            finite = torch.zeros(1, dtype=torch.bool, device=self.master.device)
            self.combiner.add_linear_(self.master, ways, shares, finite, None)
            return
        every = dict(zip(self.settings, self.combiner.together(ways), strict=True))
        combined = self.combiner.combined(every, shares)
        assert combined is not None
        self.master.add_(combined)

    def _clips(self, names: Sequence[str], norms: Tensor) -> Tensor:
        limits = [self.settings[n].clip_norm or float("inf") for n in names]
        return (self._on_device(limits) / norms).clamp(max=1.0)

    def _on_device(self, values: Sequence[float]) -> Tensor:
        """fp64, without waiting for the device."""
        host = torch.tensor(values, dtype=torch.float64)
        return host.to(self.master.device, non_blocking=True)

    def _move(
        self,
        names: Sequence[str],
        owners: Sequence[str],
        norms: Tensor,
        found_inf: Tensor,
        learning_rates: Mapping[str, float],
        shares: Mapping[str, float],
    ) -> None:
        """Adds the weighted sum of the updates to the master, or one to an objective's own.

        `owners` of the states, in the order of `names`.
        """
        apart = self.protected.keys() & set(names)
        if not apart and all(type(self.kept.rules[owner]) is AdamW for owner in owners):
            self._move_by_adamw(names, owners, norms, found_inf, learning_rates, shares)
            return
        total: Tensor | None = None
        for at, (name, owner) in enumerate(zip(names, owners, strict=True)):
            one, rate = slice(at, at + 1), learning_rates[name]
            delta = self._delta(name, owner, norms[one], found_inf[one], rate, None)
            part = delta * shares[name]
            total = part if total is None else total.add_(part)
        assert total is not None
        self.masters.add_(total, names[0])

    def _delta(
        self,
        name: str,
        owner: str,
        norms: Tensor,
        found_inf: Tensor,
        learning_rate: float,
        room: Tensor | None,
    ) -> Tensor:
        """One objective's update, by its rule; counts its step."""
        steps, like = self.kept.steps_of(owner), self.master
        delta = self.kept.rules[owner].delta(
            replace(self._parts[owner], master=self.masters.of(name), buffer=room),
            self.gradients[name],
            self.kept.shards[owner],
            lr=self._on_device([learning_rate]),
            steps=steps,
            clip=self._clips([name], norms),
            found_inf=found_inf,
        )
        if delta.shape != like.shape or delta.dtype != like.dtype:
            raise ValueError(
                f"the update rule '{self.kept.settings[owner].rule}' gave {list(delta.shape)} "
                f"{delta.dtype}; the shard is {list(like.shape)} {like.dtype}"
            )
        steps += ~found_inf
        # -0.0 is what changes no bit of what it is added to.
        mask = self.protected.get(name)
        return delta if mask is None else delta.masked_fill_(mask, -0.0)

    def _move_by_adamw(
        self,
        names: Sequence[str],
        owners: Sequence[str],
        norms: Tensor,
        found_inf: Tensor,
        learning_rates: Mapping[str, float],
        shares: Mapping[str, float],
    ) -> None:
        """All updates and their weighted sum in one pass."""
        master = self.masters.of(names[0])
        out = self.masters.out if master is self.master else None
        clips = self._clips(names, norms)
        lrs = self._on_device([learning_rates[n] for n in names])
        averages = self._on_device([shares[n] for n in names])
        index, states = self.kept.place_of(owners), self.kept.shards
        before = self.steps[index]
        steps = before
        for part, kind in self._kinds:
            # All parts are the same step: each call advances a copy of the same counts.
            steps = before.clone()
            average_adamw_(
                master[part],
                [self.gradients[n][part] for n in names],
                [states[n]["exp_avg"][part] for n in owners],
                [states[n]["exp_avg_sq"][part] for n in owners],
                lrs=lrs,
                betas=[self.settings[n].betas for n in names],
                eps=[self.settings[n].eps for n in names],
                weight_decays=self._on_device([self.settings[n].decay_of(kind) for n in names]),
                steps=steps,
                clips=clips,
                weights=averages,
                found_inf=found_inf,
                param_out=None if out is None else out[part],
            )
        self.steps[index] = steps

    # What goes on: from stage to stage, from checkpoints.

    def state(self) -> dict[str, Any]:
        """What of a checkpoint is not in `shards`; all ranks call it together."""
        return self.kept.state(self.replicas)

    def restore(self, state: Mapping[str, Any], owners: Sequence[str] | None = None) -> None:
        """After `shards`, or the `starting_shards` of some, were filled."""
        self.kept.restore(state, self.owners if owners is None else owners)
        self.masters.to_weights()

    def starting_shards(self, going_on: Sequence[str], weights: str = "") -> FlatShards:
        """What a run takes from the run it branches from: weights, by how names begin, states."""
        return self._shards({weights: self.master, **dict(self.kept.named(going_on))})

    @torch.no_grad()
    def take_over(self, before: Optimizer, owners: Sequence[str]) -> None:
        """Goes on with another stage's weights, in its precision, and these states; all ranks."""
        self.master.copy_(before.master)
        for local in self.masters.locals.values():
            local.copy_(self.master)
        for owner in owners:
            if owner in before.kept.settings and owner in self.kept.settings:
                self.kept.take(before.kept, owner, before.from_owner)

    def from_owner(self, tensor: Tensor, owner: str) -> Tensor:
        """In place, on every replica what the replica that trains `owner` has."""
        if self.combiner.in_replicas and owner in self.settings:
            broadcast_(tensor, self.replicas, list(self.settings).index(owner))
        return tensor

    def gradient_shard(self, objective: str) -> Tensor:
        return self.gradients[objective]
