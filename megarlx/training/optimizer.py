"""AdamW for n objectives on this rank's shard: ZeRO-1 around `average_adamw_`.

Every objective has its own moments, step count, clip factor and weight; n = 1 is ordinary
training. The master weights are fp32 (fp64 in fp64 runs) and exist for the shard only; where the
model computes in that same type on one data-parallel rank, they are the weights themselves.

With `shared_moments` the objectives' gradients are averaged instead of their updates: one Adam.

Two things may differ from "every rank, every step". With `replicas` each rank trains one of the
objectives, has only its moments, and the update shards are added up over that axis, so that the
masters stay the same bits everywhere. With `local_steps` an objective goes on by itself from a
master of its own until a step with `average=True`, which applies the weighted sum of the ways that
they went; in between, `master` is where all of them began.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megarlx.comm.collectives import all_reduce_
from megarlx.ops.averaging import adamw_update_, average_adamw_, replica_average_
from megarlx.training.optimizer_state import SHARED, OptimizerState
from megarlx.training.update_rules import EMBEDDING, Kind

__all__ = ["SHARED", "Optimizer", "StepReport"]


@dataclass(frozen=True)
class StepReport:
    """Of one optimizer step, on the device: read it when logging, not in between."""

    gradient_norms: dict[str, Tensor]
    found_inf: dict[str, Tensor]


class Optimizer(OptimizerState):
    """The optimizer of one rank.

    `gradient_shard(objective)` is where that objective's reduced gradients go; `step` then clips,
    updates all objectives from one snapshot, applies the weighted sum and gathers the weights.
    """

    def _squared_norm(self, gradient: Tensor) -> Tensor:
        total = torch.linalg.vector_norm(gradient, dtype=gradient.dtype).square()
        for start, stop in self._uncounted:
            total = total - torch.linalg.vector_norm(gradient[start:stop]).square()
        return total.double()

    def gradient_norms(self, gradients: Sequence[Tensor]) -> Tensor:
        """Global norm of each: every element of the model counted once, on every rank."""
        squares = torch.stack([self._squared_norm(g) for g in gradients])
        for group in (self.data_parallel.group, *self.norm_groups):
            all_reduce_(squares, group)
        return squares.sqrt()

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
        norms = self.gradient_norms([self.gradients[name] for name in names])
        found_inf = (~torch.isfinite(norms)).to(self.master.dtype)
        report = self._report(active, names, norms, found_inf)
        if self.shared:
            self._update_shared(names, found_inf, report, learning_rates, shares)
        elif self.locals:
            for at, name in enumerate(names):
                one = slice(at, at + 1)
                self._update(
                    [name],
                    [name],
                    norms[one],
                    found_inf[one],
                    learning_rates,
                    {name: 1.0},
                    self.locals[name],
                )
            if average:
                self._average_locals(shares)
                self.weights_from_masters()
            return report
        elif self._in_replicas:
            self._update_replica(names[0], norms, found_inf, learning_rates, shares)
        else:
            self._update(names, names, norms, found_inf, learning_rates, shares)
        self.data_parallel.gather_weights(
            self.master if self.weights_out is None else self.weights_out
        )
        return report

    def _report(
        self, active: Sequence[str], names: Sequence[str], norms: Tensor, found_inf: Tensor
    ) -> StepReport:
        """Of all active objectives, on every rank."""
        if self._in_replicas:
            mine = torch.stack((norms, found_inf.to(norms.dtype)))
            table = mine.new_zeros(2, len(active))
            for at, name in enumerate(names):
                table[:, active.index(name)] = mine[:, at]
            norms, found_inf = all_reduce_(table, self.replicas).unbind()
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
        """One Adam for the weighted sum of the gradients."""
        first = names[0]
        mixed = self.gradients[first]
        if self._in_replicas:
            replica_average_(
                mixed,
                mixed,
                weight=shares[first],
                group=self.replicas,
                of="gradients",
                packed=self._packed,
                found_inf=found_inf,
            )
        else:
            mixed.mul_(shares[first])
            for name in names[1:]:
                mixed.add_(self.gradients[name], alpha=shares[name])
        # What is mixed cannot be taken apart: one that is not finite skips the step.
        every = torch.stack(list(report.found_inf.values())).to(self.master.dtype)
        rate = learning_rates[next(iter(report.found_inf))]  # the same for all
        norms = self.gradient_norms([mixed])
        skip = every.amax(0, keepdim=True)
        self._update([first], [SHARED], norms, skip, {first: rate}, {first: 1.0})

    def _update_replica(
        self,
        name: str,
        norms: Tensor,
        found_inf: Tensor,
        learning_rates: Mapping[str, float],
        shares: Mapping[str, float],
    ) -> None:
        """This replica's own update, and then the sum of all of them."""
        assert self._delta is not None
        settings, at = self.settings[name], self.owners.index(name)
        clip = self._clips([name], norms)
        before = self.steps[at : at + 1]
        steps = before
        for part, kind in self._parts():
            steps = before.clone()
            adamw_update_(
                self.master[part],
                self.gradients[name][part],
                self.exp_avgs[name][part],
                self.exp_avg_sqs[name][part],
                lr=learning_rates[name],
                betas=settings.betas,
                eps=settings.eps,
                weight_decay=settings.decay_of(kind),
                steps=steps,
                clip=clip,
                found_inf=found_inf,
                delta=self._delta[part],
            )
        before.copy_(steps)
        self._sum_over_replicas(self._delta, shares[name], found_inf, self.weights_out)

    def _sum_over_replicas(
        self, delta: Tensor, share: float, found_inf: Tensor, out: Tensor | None
    ) -> None:
        replica_average_(
            self.master,
            delta,
            weight=share,
            group=self.replicas,
            packed=self._packed,
            found_inf=found_inf,
            param_out=out,
        )

    def _average_locals(self, shares: Mapping[str, float]) -> None:
        """The weighted sum of the ways that the objectives went since they were last together."""
        for local in self.locals.values():
            local.sub_(self.master)
        for name, way in self.locals.items():
            if self._in_replicas:
                finite = torch.zeros(1, dtype=torch.bool, device=way.device)
                self._sum_over_replicas(way, shares[name], finite, None)
            else:
                self.master.add_(way, alpha=shares[name])

    def _parts(self) -> Iterator[tuple[slice, Kind]]:
        """The parts of the shard that decay alike; empty ones are left out."""
        border = self.data_parallel.layout.decayed_shard_size
        apart = not all(one.decay_embeddings for one in self.settings.values())
        bounds: list[tuple[int, int, Kind]] = []
        at = 0
        for low, high in self.data_parallel.ranges_of(EMBEDDING) if apart else ():
            bounds += [(at, low, "matrices"), (low, high, "embedding")]
            at = high
        bounds += [(at, border, "matrices"), (border, self.master.numel(), "vectors")]
        for low, high, kind in bounds:
            if low < high:
                yield slice(low, high), kind

    def _clips(self, names: Sequence[str], norms: Tensor) -> Tensor:
        limits = [self.settings[n].clip_norm or float("inf") for n in names]
        limit = torch.tensor(limits, dtype=torch.float64).to(norms.device, non_blocking=True)
        return (limit / norms).clamp(max=1.0)

    def _update(
        self,
        names: Sequence[str],
        owners: Sequence[str],
        norms: Tensor,
        found_inf: Tensor,
        learning_rates: Mapping[str, float],
        shares: Mapping[str, float],
        local: Tensor | None = None,
    ) -> None:
        """Clips, and averages the updates; `owners` of the moments, in the order of `names`.

        A `local` master moves in place of the common one, and is not written to the weights.
        """
        master = self.master if local is None else local
        out = self.weights_out if local is None else None

        def scalars(values: Sequence[float]) -> Tensor:  # the op reads them in fp64
            host = torch.tensor(values, dtype=torch.float64)
            return host.to(self.master.device, non_blocking=True)

        clips = self._clips(names, norms)
        lrs = scalars([learning_rates[n] for n in names])
        averages = scalars([shares[n] for n in names])
        index = self.place_of(owners)
        before = self.steps[index]
        steps = before
        for part, kind in self._parts():
            # All parts are the same step: each call advances a copy of the same counts.
            steps = before.clone()
            decay = [self.settings[n].decay_of(kind) for n in names]
            average_adamw_(
                master[part],
                [self.gradients[n][part] for n in names],
                [self.exp_avgs[n][part] for n in owners],
                [self.exp_avg_sqs[n][part] for n in owners],
                lrs=lrs,
                betas=[self.settings[n].betas for n in names],
                eps=[self.settings[n].eps for n in names],
                weight_decays=scalars(decay),
                steps=steps,
                clips=clips,
                weights=averages,
                found_inf=found_inf,
                param_out=None if out is None else out[part],
            )
        self.steps[index] = steps
