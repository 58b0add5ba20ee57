"""How an objective's gradient becomes its update: the interface, and AdamW.

An update rule is a class of `module:Class`, made with the objective's settings and `rule_options`.
It sees this rank's shard only, flat and in pieces; `Parts.on_whole` shows it whole matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from megarlx import plug
from megarlx.ops.averaging import adamw_update_
from megarlx.training.parts import Parts, UpdateSettings


class UpdateRule(Protocol):
    """Made as `Rule(settings, **rule_options)`."""

    @property
    def state(self) -> tuple[str, ...]:
        """Names of what it keeps of each element of the shard, in the masters' type; 0 at first."""
        ...

    def whole(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether it must see a tensor of the model whole."""
        ...

    def delta(
        self,
        parts: Parts,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        lr: Tensor,
        steps: Tensor,
        clip: Tensor,
        found_inf: Tensor,
    ) -> Tensor:
        """The whole update of the shard [P], decoupled decay included; `state` moves in place.

        `gradient` [P] still has to be multiplied by `clip`. lr and clip are fp64 [1], steps (those
        finished before this one; the caller counts) int64 [1], found_inf bool [1], all on the
        device. Where found_inf is set, the update is 0 and no state changes: both are selected,
        since 0 · NaN is NaN.
        """
        ...


class AdamW:
    state = ("exp_avg", "exp_avg_sq")

    def __init__(self, settings: UpdateSettings) -> None:
        self.settings = settings

    def whole(self, name: str, shape: tuple[int, ...]) -> bool:
        return False

    def delta(
        self,
        parts: Parts,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        lr: Tensor,
        steps: Tensor,
        clip: Tensor,
        found_inf: Tensor,
    ) -> Tensor:
        return self.write(parts.room(), parts, gradient, state, lr, steps, clip, found_inf)

    def write(
        self,
        delta: Tensor,
        parts: Parts,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        lr: Tensor,
        steps: Tensor,
        clip: Tensor,
        found_inf: Tensor,
    ) -> Tensor:
        """Into `delta` [P] what AdamW makes of the ranges that are not whole."""
        for part, decay, whole in parts.ranges:
            if not whole:
                adamw_update_(
                    parts.master[part],
                    gradient[part],
                    state["exp_avg"][part],
                    state["exp_avg_sq"][part],
                    lr=lr,
                    betas=self.settings.betas,
                    eps=self.settings.eps,
                    weight_decay=decay,
                    steps=steps.clone(),  # the op counts; each range is the same step
                    clip=clip,
                    found_inf=found_inf,
                    delta=delta[part],
                )
        return delta


def rule_of(settings: UpdateSettings) -> UpdateRule:
    """The rule that an objective's settings name."""
    made = plug.resolve("update rule", settings.rule)
    try:
        rule: UpdateRule = made(settings, **settings.rule_options)
    except (TypeError, ValueError) as error:
        raise plug.PlugError(
            f"update rule '{settings.rule}' cannot be made with rule_options "
            f"{dict(settings.rule_options)}: {error}"
        ) from error
    if missing := [name for name in ("state", "whole", "delta") if not hasattr(rule, name)]:
        raise plug.PlugError(
            f"update rule '{settings.rule}' has no {', '.join(missing)}; it needs what UpdateRule "
            "in megarlx/training/update_rules.py has"
        )
    return rule
