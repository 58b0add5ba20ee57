"""AdamW for n objectives on this rank's shard: ZeRO-1 around `average_adamw_`.

Every objective has its own moments, step count, clip factor and weight; n = 1 is ordinary
training. The master weights are fp32 (fp64 in fp64 runs) and exist for the shard only; where the
model computes in that same type on one data-parallel rank, they are the weights themselves.

With `shared_moments` the objectives' gradients are averaged instead of their updates: one Adam.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megarlx.checkpoint import FROZEN, OPTIMIZER, CheckpointError, FlatShards
from megarlx.comm.collectives import all_reduce_
from megarlx.comm.groups import Group
from megarlx.ops import average_adamw_
from megarlx.parallel.data_parallel import DataParallel

SHARED = "shared"  # whose the moments are where all objectives have the same ones


@dataclass(frozen=True)
class AdamSettings:
    """What does not change from step to step, for one objective."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0


@dataclass(frozen=True)
class StepReport:
    """Of one optimizer step, on the device: read it when logging, not in between."""

    gradient_norms: dict[str, Tensor]
    found_inf: dict[str, Tensor]


class AveragingAdamW:
    """The optimizer of one rank.

    `gradient_shard(objective)` is where that objective's reduced gradients go; `step` then clips,
    updates all objectives from one snapshot, applies the weighted sum and gathers the weights.
    """

    def __init__(
        self,
        data_parallel: DataParallel,
        settings: Mapping[str, AdamSettings],
        norm_groups: Sequence[Group],
        *,
        shared_moments: bool = False,
        frozen: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`frozen` shards are saved and restored beside the weights (a reference policy's, say)."""
        if not settings:
            raise ValueError("an optimizer needs at least one objective")
        self.data_parallel, self.settings = data_parallel, dict(settings)
        if shared_moments and len(set(self.settings.values())) > 1:
            raise ValueError(f"one Adam cannot have the settings {self.settings}; they differ")
        self.norm_groups, self.shared = tuple(norm_groups), shared_moments
        layout, weights = data_parallel.layout, data_parallel.weights
        size, dtype = layout.shard_size, data_parallel.gradient_dtype
        shard = data_parallel.shard_of_weights()
        self.masters_are_weights = shard is weights and weights.dtype == dtype
        self.master = shard if self.masters_are_weights else shard.to(dtype, copy=True)
        self.weights_out = None if self.masters_are_weights else self._weights_out(shard)

        def zeros() -> Tensor:
            return torch.zeros(size, dtype=dtype, device=weights.device)

        names = list(self.settings)
        self.owners = [SHARED] if shared_moments else names  # of moments
        self.exp_avgs = {name: zeros() for name in self.owners}
        self.exp_avg_sqs = {name: zeros() for name in self.owners}
        self.steps = torch.zeros(len(self.owners), dtype=torch.int64, device=weights.device)
        # One objective on one rank reduces in place; several must outlive the gradient buffer.
        alone = len(names) == 1 and data_parallel.group.size == 1
        self.gradients = {name: data_parallel.gradients if alone else zeros() for name in names}
        self._uncounted = data_parallel.uncounted_ranges()
        # What a checkpoint holds of this rank, under the names that it gets there.
        moments = [("exp_avg", self.exp_avgs), ("exp_avg_sq", self.exp_avg_sqs)]
        self.frozen = dict(frozen or {})
        self.shards = self._shards(
            {"": self.master}
            | {f"{OPTIMIZER}{n}/{k}/": shard[n] for n in self.owners for k, shard in moments}
            | {f"{FROZEN}{name}/": shard for name, shard in self.frozen.items()}
        )

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
        """What of a checkpoint is not in `shards`."""
        return {"steps": dict(zip(self.owners, self.steps.tolist(), strict=True))}

    def starting_shards(self, going_on: Sequence[str]) -> FlatShards:
        """What a run takes over from the run it branches from: weights, and some moments."""
        moments = [("exp_avg", self.exp_avgs), ("exp_avg_sq", self.exp_avg_sqs)]
        return self._shards(
            {"": self.master}
            | {f"{OPTIMIZER}{n}/{k}/": shard[n] for n in going_on for k, shard in moments}
        )

    def start(self, going_on: Sequence[str], state: Mapping[str, Any]) -> None:
        """After `starting_shards` were filled."""
        steps = _steps(state, going_on)
        for name in going_on:
            self.steps[self.owners.index(name)] = steps[name]
        self.weights_from_masters()

    def take_moments(self, before: AveragingAdamW, objective: str) -> None:
        """Goes on with an objective where another stage's optimizer left it."""
        for mine, theirs in (
            (self.exp_avgs, before.exp_avgs),
            (self.exp_avg_sqs, before.exp_avg_sqs),
        ):
            mine[objective].copy_(theirs[objective])
        at, was = self.owners.index(objective), before.owners.index(objective)
        self.steps[at] = before.steps[was]

    def restore(self, state: Mapping[str, Any]) -> None:
        """After `shards` were filled."""
        steps = _steps(state, self.owners)
        self.steps.copy_(torch.tensor([steps[name] for name in self.owners]))
        self.weights_from_masters()

    @torch.no_grad()
    def weights_from_masters(self) -> None:
        """The model's weights again, rounded as a step would round them."""
        if self.weights_out is not None:
            self.weights_out.copy_(self.master)
        self.data_parallel.gather_weights(
            self.master if self.weights_out is None else self.weights_out
        )

    def gradient_shard(self, objective: str) -> Tensor:
        return self.gradients[objective]

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

    def step(
        self, learning_rates: Mapping[str, float], weights: Mapping[str, float] | None = None
    ) -> StepReport:
        """One update by the objectives that `learning_rates` names; the others stay as they are.

        `weights` of their updates (default: equal, summing to one).
        """
        names = [name for name in self.settings if name in learning_rates]
        shares = weights or {name: 1.0 / len(names) for name in names}
        gradients = [self.gradients[name] for name in names]
        norms = self.gradient_norms(gradients)
        found_inf = (~torch.isfinite(norms)).to(self.master.dtype)
        report = StepReport(
            dict(zip(names, norms, strict=True)), dict(zip(names, found_inf, strict=True))
        )
        if self.shared:
            mixed = gradients[0].mul_(shares[names[0]])
            for name, gradient in zip(names[1:], gradients[1:], strict=True):
                mixed.add_(gradient, alpha=shares[name])
            norms = self.gradient_norms([mixed])
            found_inf = found_inf.amax(0, keepdim=True)  # what is mixed cannot be taken apart
            self._update([names[0]], [SHARED], norms, found_inf, learning_rates, {names[0]: 1.0})
        else:
            self._update(names, names, norms, found_inf, learning_rates, shares)
        self.data_parallel.gather_weights(
            self.master if self.weights_out is None else self.weights_out
        )
        return report

    def _update(
        self,
        names: Sequence[str],
        owners: Sequence[str],
        norms: Tensor,
        found_inf: Tensor,
        learning_rates: Mapping[str, float],
        shares: Mapping[str, float],
    ) -> None:
        """Clips, and averages the updates; `owners` of the moments, in the order of `names`."""
        device, dtype = self.master.device, self.master.dtype

        def scalars(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

        limits = [self.settings[n].clip_norm or float("inf") for n in names]
        clips = (scalars(limits) / norms).clamp(max=1.0).to(dtype)
        lrs = scalars([learning_rates[n] for n in names])
        averages = scalars([shares[n] for n in names])
        border = self.data_parallel.layout.decayed_shard_size
        index = torch.tensor([self.owners.index(n) for n in owners], device=device)
        before = self.steps[index]
        steps = before
        for low, high, decays in ((0, border, True), (border, self.master.numel(), False)):
            if low == high:
                continue
            # Both parts are the same step: each call advances a copy of the same counts.
            steps = before.clone()
            decay = [self.settings[n].weight_decay if decays else 0.0 for n in names]
            average_adamw_(
                self.master[low:high],
                [self.gradients[n][low:high] for n in names],
                [self.exp_avgs[n][low:high] for n in owners],
                [self.exp_avg_sqs[n][low:high] for n in owners],
                lrs=lrs,
                betas=[self.settings[n].betas for n in names],
                eps=[self.settings[n].eps for n in names],
                weight_decays=scalars(decay),
                steps=steps,
                clips=clips,
                weights=averages,
                found_inf=found_inf,
                param_out=None if self.weights_out is None else self.weights_out[low:high],
            )
        self.steps[index] = steps


def _steps(state: Mapping[str, Any], owners: Sequence[str]) -> Mapping[str, int]:
    steps = state.get("steps")
    if not isinstance(steps, Mapping) or any(
        type(steps.get(name)) is not int or steps[name] < 0 for name in owners
    ):
        raise CheckpointError(
            f"optimizer steps are {steps!r}; expected one count each of {', '.join(owners)}"
        )
    return steps
