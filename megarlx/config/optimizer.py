"""The update rule, and how its learning rate goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from megarlx.config.section import Named, Section

# A list in TOML and in JSON is a tuple here: frozen like the rest. What is in it stays strict.
Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """The update rule of an objective, and the course of its learning rate."""

    rule: Annotated[str, Named("update rule")] = Field(
        default="adamw", description="What makes an update of a gradient; see docs/extending.md"
    )
    rule_options: dict[str, Any] = Field(
        default={}, description="Keyword arguments of the rule, beside the keys here"
    )

    lr: float = Field(
        default=4e-4, ge=0, description="Highest learning rate; sft and rl have to say theirs"
    )
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = Field(
        default=(0.9, 0.95), description="Decay of the first and of the second moment at each step"
    )
    eps: float = Field(default=1e-8, gt=0, description="Added to the root of the second moment")
    weight_decay: float = Field(
        default=0.1, ge=0, description="Decoupled weight decay, scaled by the lr"
    )
    decay_embeddings: bool = Field(
        default=True, description="Whether the token embedding decays too; OLMo-core's does not"
    )
    clip_norm: float = Field(
        default=1.0, ge=0, description="Largest global gradient norm; 0 turns clipping off"
    )
    schedule: Literal["cosine", "linear", "wsd", "constant"] = Field(
        default="cosine",
        description="Course of the learning rate after the warm-up; wsd: stable, decay",
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="Steps in which the learning rate rises from 0"
    )
    schedule_steps: int | None = Field(
        default=None,
        ge=1,
        description="Length of the learning-rate course; absent: the steps in its stage",
    )
    decay_steps: int | None = Field(
        default=None,
        ge=1,
        description="Last steps in which wsd goes down; absent: a tenth of all steps",
    )
    final_lr_fraction: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Learning rate at the last step as a fraction of lr; not for constant",
    )

    def problems(self) -> list[tuple[str, str]]:
        if self.decay_steps is None or self.schedule == "wsd":
            return []
        return [("decay_steps", f"is used by schedule = 'wsd' only, not by '{self.schedule}'")]


def merged(before: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What one table does not say another does; wsd's decay_steps is not for another schedule."""
    found = {**before, **own}
    if own.get("schedule", "wsd") != "wsd" and "decay_steps" not in own:
        found.pop("decay_steps", None)
    return found
