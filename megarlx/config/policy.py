"""What a policy-gradient loss is made of, and the settings that published methods gave names to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megarlx.config.section import Named, Section

PresetName = Literal["grpo", "dapo", "dr_grpo", "gspo", "rloo", "cispo", "gigpo", "sampo"]

# Only what differs from PolicyConfig's defaults; docs/rl.md shows all of it as a table.
PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {"aggregation": "sequence_mean", "kl": "k3", "kl_coefficient": 0.04},
    "dapo": {"clip_high": 0.28, "drop_uninformative": True, "overlong": "penalty"},
    "dr_grpo": {"advantage": "dr_grpo", "aggregation": "sequence_sum_fixed"},
    "gspo": {
        "loss": "gspo",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregation": "sequence_mean",
    },
    "rloo": {
        "advantage": "rloo",
        "loss": "reinforce",
        "aggregation": "sequence_sum",
        "kl": "reward",
        "kl_coefficient": 0.05,
    },
    "cispo": {"loss": "cispo", "clip_low": 1.0, "clip_high": 4.0},
    "gigpo": {"advantage": "gigpo", "kl": "k3", "kl_coefficient": 0.01},
    "sampo": {
        "advantage": "gigpo",
        "loss": "gspo",
        "clip_low": 3e-3,
        "clip_high": 4e-3,
        "aggregation": "sequence_mean",
        "kl": "k3",
        "kl_coefficient": 0.01,
        "drop_uninformative": True,
    },
}


class PolicyConfig(Section):
    """Advantages, loss, aggregation and penalties of policy optimisation."""

    preset: PresetName | None = Field(
        default=None, description="Published method whose settings hold where no others are given"
    )
    advantage: Annotated[str, Named("advantage")] = Field(
        default="grpo",
        description="Reward less its group's mean; gigpo: also a turn's; see docs/rl.md",
    )
    omega: float = Field(
        default=1.0, ge=0, description="Weight of a turn's own advantage beside the episode's"
    )
    gamma: float = Field(
        default=0.95, ge=0, le=1, description="Discount of a later turn's reward, for gigpo"
    )
    drop_uninformative: bool = Field(
        default=False, description="Groups whose rewards are all equal are replaced by new ones"
    )
    drop_uninformative_after_steps: int = Field(
        default=0, ge=0, description="Steps of a cold start in which no group is dropped"
    )
    loss: Annotated[str, Named("loss")] = Field(
        default="ppo_clip", description="How the ratio of new to old probability enters the loss"
    )
    loss_options: dict[str, Any] = Field(
        default={}, description="Settings of a loss, advantage or aggregation of your own"
    )
    clip_low: float = Field(default=0.2, ge=0, description="Ratios count down to 1 - clip_low")
    clip_high: float = Field(default=0.2, ge=0, description="Ratios count up to 1 + clip_high")
    dual_clip: float = Field(
        default=0.0,
        ge=0,
        description="Ratios of bad samples count up to this, over 1; 0: all; for ppo_clip, gspo",
    )
    sapo_temperatures: tuple[float, float] = Field(
        default=(1.0, 1.05),
        strict=False,
        description="Steepness of sapo's soft gate for positive and for other advantages",
    )
    aggregation: Annotated[str, Named("aggregation")] = Field(
        default="token_mean",
        description="Mean of tokens; or of sequences' means, sums, or sums by the length limit",
    )
    kl: Literal["none", "k1", "k2", "k3", "reward"] = Field(
        default="none",
        description="Divergence from the reference: estimated in the loss, or off the reward",
    )
    kl_coefficient: float = Field(default=0.0, ge=0, description="Weight of the divergence")
    entropy_coefficient: float = Field(default=0.0, description="Weight of the entropy bonus")
    importance_cap: float | None = Field(
        default=None,
        gt=0,
        description="Upper limit of the weights that correct what was sampled to what is trained; "
        "absent: no such weights",
    )
    sequence_mask: float | None = Field(
        default=None,
        gt=0,
        description="Drops a sequence with negative advantage when its mean log-ratio is below "
        "minus this",
    )
    overlong: Literal["keep", "mask", "penalty"] = Field(
        default="keep",
        description="Samples that end at the limit: as others, not learned, or with less reward",
    )
    overlong_buffer: float = Field(
        default=0.2, gt=0, le=1, description="Share of the length limit in which the penalty grows"
    )

    @model_validator(mode="before")
    @classmethod
    def _preset_under_given(cls, given: Any) -> Any:
        known = PRESETS.get(str(given.get("preset"))) if isinstance(given, dict) else None
        return {**known, **given} if known else given

    def problems(self) -> list[tuple[str, str]]:
        found = []
        if (self.kl == "none") != (self.kl_coefficient == 0):
            needs = "0" if self.kl == "none" else "more than 0"
            found.append(
                ("kl_coefficient", f"is {self.kl_coefficient}; with kl = '{self.kl}' it is {needs}")
            )
        without = self.loss in ("reinforce", "cispo", "sapo")
        if self.dual_clip and (self.dual_clip <= 1 or without):
            found.append(
                (
                    "dual_clip",
                    f"is {self.dual_clip} with loss = '{self.loss}'; allowed are 0, and numbers "
                    "over 1 with ppo_clip, gspo and losses of your own",
                )
            )
        if self.advantage == "maxrl":
            below = {"kl": self.kl == "reward", "overlong": self.overlong == "penalty"}
            found += [
                (
                    key,
                    f"is '{getattr(self, key)}', which may take a reward below 0; maxrl divides by "
                    "the group's mean, and allows none",
                )
                for key, given in below.items()
                if given
            ]
        for name in sorted(self.loss_options):
            taken = {*type(self).model_fields, "max_completion_tokens"}
            if name in taken or not name.isidentifier():
                found.append(("loss_options", f"has {name!r}; it must be a name of its own"))
        if min(self.sapo_temperatures) <= 0:
            found.append(("sapo_temperatures", f"are {self.sapo_temperatures}; both must be > 0"))
        return found

    def settings(self, max_completion_tokens: int = 0) -> SimpleNamespace:
        """The `c` of losses, advantages and aggregations: these keys and loss_options."""
        own = {name: getattr(self, name) for name in type(self).model_fields}
        more = {**self.loss_options, "max_completion_tokens": max_completion_tokens}
        return SimpleNamespace(**own, **more)

    @property
    def needs_reference(self) -> bool:
        return self.kl != "none"

    @property
    def kl_of_loss(self) -> Literal["none", "k1", "k2", "k3"]:
        return "none" if self.kl == "reward" else self.kl
