"""AdamW for n objectives on this rank's shard: ZeRO-1 around `average_adamw_`.

Every objective has its own moments, step count, clip factor and weight; n = 1 is ordinary
training. The master weights are fp32 (fp64 in fp64 runs) and exist for the shard only; where the
model computes in that same type on one data-parallel rank, they are the weights themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megarlx.checkpoint import CheckpointError, FlatShards
from megarlx.comm.collectives import all_reduce_
from megarlx.comm.groups import Group
from megarlx.ops import average_adamw_
from megarlx.parallel.data_parallel import DataParallel


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
    ) -> None:
        if not settings:
            raise ValueError("an optimizer needs at least one objective")
        self.data_parallel, self.settings = data_parallel, dict(settings)
        self.norm_groups = tuple(norm_groups)
        layout, weights = data_parallel.layout, data_parallel.weights
        size, dtype = layout.shard_size, data_parallel.gradient_dtype
        shard = data_parallel.shard_of_weights()
        self.masters_are_weights = shard is weights and weights.dtype == dtype
        self.master = shard if self.masters_are_weights else shard.to(dtype, copy=True)
        self.weights_out = None if self.masters_are_weights else self._weights_out(shard)

        def zeros() -> Tensor:
            return torch.zeros(size, dtype=dtype, device=weights.device)

        names = list(self.settings)
        self.exp_avgs = {name: zeros() for name in names}
        self.exp_avg_sqs = {name: zeros() for name in names}
        self.steps = torch.zeros(len(names), dtype=torch.int64, device=weights.device)
        # One objective on one rank reduces in place; several must outlive the gradient buffer.
        alone = len(names) == 1 and data_parallel.group.size == 1
        self.gradients = {name: data_parallel.gradients if alone else zeros() for name in names}
        self._uncounted = data_parallel.uncounted_ranges()
        # What a checkpoint holds of this rank, under the names that it gets there.
        moments = [("exp_avg", self.exp_avgs), ("exp_avg_sq", self.exp_avg_sqs)]
        self.weight_shards = self._shards({"": self.master})
        self.shards = self._shards(
            {"": self.master}
            | {f"optimizer/{n}/{kind}/": shard[n] for n in names for kind, shard in moments}
        )
        self._ones = torch.ones(len(names), dtype=dtype, device=weights.device)

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
        return {"steps": dict(zip(self.settings, self.steps.tolist(), strict=True))}

    def restore(self, state: Mapping[str, Any]) -> None:
        """After `shards` were filled."""
        steps = state.get("steps")
        if (
            not isinstance(steps, dict)
            or set(steps) != set(self.settings)
            or any(type(n) is not int or n < 0 for n in steps.values())
        ):
            raise CheckpointError(
                f"optimizer steps are {steps!r}; expected one count each of "
                f"{', '.join(self.settings)}"
            )
        self.steps.copy_(torch.tensor([steps[name] for name in self.settings]))
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

    def gradient_norms(self) -> Tensor:
        """Global norm per objective: every element of the model counted once, on every rank."""
        squares = torch.stack([self._squared_norm(g) for g in self.gradients.values()])
        for group in (self.data_parallel.group, *self.norm_groups):
            all_reduce_(squares, group)
        return squares.sqrt()

    def step(
        self, learning_rates: Mapping[str, float], weights: Mapping[str, float] | None = None
    ) -> StepReport:
        """One update; `weights` of the objectives' updates (default: equal, summing to one)."""
        names = list(self.settings)
        device, dtype = self.master.device, self.master.dtype
        norms = self.gradient_norms()
        found_inf = (~torch.isfinite(norms)).to(dtype)

        def scalars(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

        limits = [self.settings[n].clip_norm or float("inf") for n in names]
        clips = (scalars(limits) / norms).clamp(max=1.0).to(dtype)
        shares = weights or {name: 1.0 / len(names) for name in names}
        lrs, averages = (
            scalars([learning_rates[n] for n in names]),
            scalars([shares[n] for n in names]),
        )
        border = self.data_parallel.layout.decayed_shard_size
        steps = self.steps
        for low, high, decays in ((0, border, True), (border, self.master.numel(), False)):
            if low == high:
                continue
            # Both parts are the same step: each call advances a copy of the same counts.
            steps = self.steps.clone()
            decay = [self.settings[n].weight_decay if decays else 0.0 for n in names]
            average_adamw_(
                self.master[low:high],
                [self.gradients[n][low:high] for n in names],
                [self.exp_avgs[n][low:high] for n in names],
                [self.exp_avg_sqs[n][low:high] for n in names],
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
        self.steps.copy_(steps)
        self.data_parallel.gather_weights(
            self.master if self.weights_out is None else self.weights_out
        )
        return StepReport(
            dict(zip(names, norms, strict=True)), dict(zip(names, found_inf, strict=True))
        )
