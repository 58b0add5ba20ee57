"""What is trained on beside pre-training data, and in what stages."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from megarlx.config.environment import EnvironmentConfig
from megarlx.config.optimizer import OptimizerConfig
from megarlx.config.policy import PolicyConfig
from megarlx.config.reward import RewardConfig
from megarlx.config.section import Named, Section
from megarlx.config.timeline import StageTimes

PRETRAINING, SFT, RL = "pretraining", "sft", "rl"
PLACE = "{content}"
MADE = "{made}"  # in a path: the folder that data.maker writes


class TemplateConfig(Section):
    """How turns are written for the model; {content} stands for a turn's text."""

    chat: str | None = Field(
        default=None,
        description="In place of the rest: the model's own chat template, in Jinja; a converted "
        "run has it",
    )
    bos: str = Field(default="", description="What chat calls bos_token")
    user: str | None = Field(
        default=None, description="A question, or a user's turn; needed where chat is not given"
    )
    system: str = Field(default="{content}\n", description="A system's turn")
    opening: str = Field(default="", description="Stands before each answer, given to the model")
    assistant: str = Field(
        default=" {content}", description="An answer; all of it, and an end of text, is learned"
    )

    tool: str = Field(default="{content}\n", description="What a tool answers")

    def problems(self) -> list[tuple[str, str]]:
        if self.chat is not None:
            plain = {name: field.default for name, field in type(self).model_fields.items()}
            frames = ("user", "system", "opening", "assistant", "tool")
            said = [name for name in frames if getattr(self, name) != plain[name]]
            return [(name, "cannot be given together with chat") for name in said]
        if self.user is None:
            return [("user", "is missing; give user, or chat")]
        found = [
            (name, f"is {text!r}; it must hold {PLACE} once")
            for name in ("user", "system", "assistant", "tool")
            if (text := getattr(self, name)).count(PLACE) != 1
        ]
        return found + ([("bos", "is for chat, which is not given")] if self.bos else [])


WRITE_TEMPLATE = r'write [template] with, for example, user = "Question: {content}\nAnswer:"'


class SftConfig(Section):
    """Supervised fine-tuning on conversations, or questions with answers."""

    conversations: str = Field(
        default="{made}/demonstrations.jsonl",
        description="JSONL file, one conversation or question a line; {made}: data.maker's folder",
    )
    demonstrations: Literal["one", "all"] = Field(
        default="one", description="How many of a question's answers are learned"
    )
    sequences_per_step: int | None = Field(
        default=None,
        ge=1,
        description="Packed sequences in one step; absent: training.sequences_per_step",
    )
    sequences_per_microbatch: int | None = Field(
        default=None, ge=1, description="Absent: training.sequences_per_microbatch"
    )
    sequence_length: int | None = Field(
        default=None, ge=1, description="Tokens of a packed sequence; absent: training's"
    )
    packing: bool = Field(
        default=True, description="Whether a sequence holds several conversations"
    )
    too_long: Literal["stop", "skip"] = Field(
        default="stop", description="What happens with conversations longer than a sequence"
    )


class RlConfig(Section):
    """Policy optimisation on the model's own samples."""

    prompts: str = Field(
        default="{made}/prompts.jsonl",
        description="JSONL file, one prompt a line; {made}: data.maker's folder",
    )
    question_key: str = Field(default="question", description="Key of the question in a line")
    answer_key: str = Field(default="answer", description="Key of the reference answer in a line")
    examples: str | None = Field(
        default=None, description="JSONL of solved examples put before every question"
    )
    prompts_per_step: int = Field(default=16, ge=1, description="Prompts of one optimizer step")
    samples_per_prompt: int = Field(default=8, ge=2, description="Samples of each prompt: a group")
    steps_per_rollout: int = Field(
        default=1, ge=1, description="Steps whose prompts are sampled from one policy at once"
    )
    epochs_per_rollout: int = Field(default=1, ge=1, description="Times each sample is trained on")
    max_completion_tokens: int = Field(default=128, ge=1, description="Longest completion")
    max_prompt_tokens: int | None = Field(
        default=None, ge=1, description="Longest prompt; absent: what the model allows"
    )
    too_long: Literal["stop", "skip"] = Field(
        default="stop", description="What happens with prompts longer than that"
    )
    temperature: float = Field(
        default=1.0, gt=0, description="Of sampling, and of the policy that is trained"
    )
    top_k: int = Field(default=0, ge=0, description="Likeliest tokens sampled from; 0: all")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Mass of the tokens sampled from")
    min_p: float = Field(
        default=0.0, ge=0, lt=1, description="Least probability, as a share of the likeliest's"
    )
    stop_strings: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(), description="Texts that end a completion, beside the end of text"
    )
    tokens_per_microbatch: int = Field(
        default=4096, ge=1, description="Tokens a process takes through the model at once"
    )
    generator: Annotated[str, Named("generator")] = Field(
        default="engine", description="What draws the samples"
    )
    slots: int = Field(
        default=256, ge=1, description="Sequences that are generated at once by a process"
    )
    prefill_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Prompt tokens a process takes through the model at once; absent: 16,384 on a "
        "GPU, 1,024 on a CPU",
    )
    environment: EnvironmentConfig | None = Field(
        default=None,
        description="What episodes are played in, in place of rewards; prompts are its tasks",
    )
    policy: PolicyConfig = Field(
        default=PolicyConfig(), description="Advantages, loss, penalties; see docs/rl.md"
    )
    rewards: Annotated[tuple[RewardConfig, ...], Field(strict=False)] = Field(
        default=(RewardConfig(function="final_number"),),
        description="What a sample is worth, each a [[rl.rewards]] table",
    )
    reward_failures_allowed: float = Field(
        default=0.1, ge=0, le=1, description="Share of a rollout a reward may fail on"
    )
    resampling_rounds: int = Field(
        default=4,
        ge=0,
        description="Most rounds that replace uninformative groups (policy.drop_uninformative)",
    )
    keep_samples_every_steps: int = Field(
        default=20, ge=1, description="Steps between samples written to samples/"
    )

    def problems(self) -> list[tuple[str, str]]:
        labels = [reward.label for reward in self.rewards]
        if not labels or len(set(labels)) < len(labels):
            given = ", ".join(labels) or "none"
            return [("rewards", f"are {given}; at least one is needed, each with its own name")]
        return self._problems_of_environment()

    def _problems_of_environment(self) -> list[tuple[str, str]]:
        environment, policy = self.environment, self.policy
        if environment is None:
            if policy.advantage == "gigpo":
                return [("policy.advantage", "is 'gigpo'; it needs turns: [rl.environment]")]
            return []
        found = []
        if "rewards" in self.model_fields_set and self.rewards != type(self)().rewards:
            found.append(("rewards", "cannot be given with an environment, which has its own"))
        if self.examples is not None:
            found.append(("examples", "cannot be given with an environment"))
        if policy.kl == "reward":
            found.append(("policy.kl", "is 'reward'; with turns it is none, k1, k2 or k3"))
        if policy.overlong == "penalty":
            found.append(("policy.overlong", "is 'penalty'; with turns it is 'keep' or 'mask'"))
        if self.tokens_per_microbatch < environment.max_episode_tokens:
            found.append(
                (
                    "tokens_per_microbatch",
                    f"is {self.tokens_per_microbatch}; an episode has up to "
                    f"environment.max_episode_tokens = {environment.max_episode_tokens}",
                )
            )
        return found

    @property
    def most_written_tokens(self) -> int:
        """Of one sample, by the policy."""
        if self.environment is None:
            return self.max_completion_tokens
        limits = self.environment
        return min(limits.max_turns * limits.max_turn_tokens, limits.max_episode_tokens)

    @property
    def steps_of_a_rollout(self) -> int:
        return self.steps_per_rollout * self.epochs_per_rollout


class OwnConfig(Section):
    """An objective that does not come with megarlx."""

    function: Annotated[str, Named("objective")] = Field(
        description="Its class, called with the model, the tokenizer and the options"
    )
    options: dict[str, Any] = Field(default={}, description="Keyword arguments of the class")


AnyObjective = SftConfig | RlConfig | OwnConfig


class ObjectiveConfig(Section):
    """A further objective under a name of its own; exactly one of its tables is given."""

    sft: SftConfig | None = Field(default=None, description="Supervised fine-tuning")
    rl: RlConfig | None = Field(default=None, description="Policy optimisation")
    own: OwnConfig | None = Field(default=None, description="An objective of yours")

    @property
    def given(self) -> list[AnyObjective]:
        return [one for one in (self.sft, self.rl, self.own) if one is not None]

    def problems(self) -> list[tuple[str, str]]:
        if len(self.given) != 1:
            return [("sft", "or rl or own: exactly one of them must be given")]
        return []


class WeightConfig(Section):
    """How much of an objective's update is applied, from a stage's first to its last step."""

    first: float = Field(default=1.0, ge=0, description="Weight at the stage's first step")
    last: float | None = Field(default=None, ge=0, description="At its last; absent: as the first")


class StageObjective(OptimizerConfig):
    """An objective in a stage: its update rule, its learning-rate course, its share."""

    weight: WeightConfig = Field(
        default=WeightConfig(),
        description="Its share under average, relative to the other objectives' weights",
    )
    turns: int = Field(
        default=1, ge=1, description="Steps in a row it gets when objectives alternate"
    )
    inherit: bool = Field(
        default=False,
        description="Whether moments, data and course continue those of the stage or run before",
    )


class AdaptiveConfig(Section):
    """Weights that follow how the objectives get on; docs/excursions.md has the rule."""

    rate: float = Field(default=0.1, gt=0, le=1, description="How fast a running mean follows")
    sharpness: float = Field(default=1.0, ge=0, description="How strongly signal moves weights")
    least: float = Field(default=0.1, ge=0, lt=0.5, description="Least share of an objective")


class StageConfig(Section):
    """Some steps of one or more objectives."""

    name: str | None = Field(default=None, min_length=1, description="Absent: its objectives'")
    steps: int = Field(ge=1, description="Optimizer steps of the stage")
    combine: Literal["single", "alternate", "average"] = Field(
        default="single",
        description="One objective, several in turn, or the weighted sum of all their updates",
    )
    of: Literal["updates", "gradients"] = Field(
        default="updates",
        description="What is averaged: updates, each with its own Adam, or gradients for one Adam",
    )
    combination: Annotated[str, Named("combination")] = Field(
        default="weighted_sum",
        description="How updates become one, or gradients; see docs/extending.md",
    )
    placement: Literal["colocated", "replicas"] = Field(
        default="colocated",
        description="Whether every process runs all objectives, or each replica runs one",
    )
    generate_together: bool = Field(
        default=True, description="Whether all replicas help to generate one objective's samples"
    )
    sync_every: int = Field(
        default=1, ge=1, description="Steps each objective takes alone between averages"
    )
    adaptive: AdaptiveConfig | None = Field(
        default=None, description="Weights that adapt, in place of the objectives' own"
    )
    objectives: dict[str, StageObjective] = Field(
        description="What is trained, by name: pretraining, sft, rl or one of [objectives]"
    )

    @property
    def label(self) -> str:
        return self.name or "+".join(self.objectives)

    @property
    def times(self) -> StageTimes:
        return StageTimes(
            {name: one.turns for name, one in self.objectives.items()},
            self.steps,
            self.combine == "alternate",
            self.sync_every,
            frozenset(name for name, one in self.objectives.items() if one.inherit),
        )

    def problems(self) -> list[tuple[str, str]]:
        found = []
        count = len(self.objectives)
        if self.combine == "single" and count != 1:
            found.append(("combine", f"is 'single' with {count} objectives; it takes one"))
        if self.combine != "single" and count < 2:
            found.append(("combine", f"is '{self.combine}' with {count} objectives; it takes two"))
        if self.combine != "average":
            given = {
                "of": self.of != "updates",
                "combination": self.combination != "weighted_sum",
                "placement": self.placement != "colocated",
                "sync_every": self.sync_every != 1,
                "adaptive": self.adaptive is not None,
            }
            found += [(k, "is for combine = 'average' only") for k, v in given.items() if v]
        elif sum(o.weight.first for o in self.objectives.values()) <= 0:
            found.append(("objectives", "have no weight above 0"))
        if self.of == "gradients" and self.sync_every > 1:
            found.append(("sync_every", f"is {self.sync_every}; with of = 'gradients' it is 1"))
        if self.of == "gradients":
            courses = {
                o.model_copy(update={"weight": WeightConfig()}).to_json()
                for o in self.objectives.values()
            }
            if len(courses) > 1:
                found.append(
                    ("of", "is 'gradients': one Adam; its objectives' settings must be the same")
                )
        return found
