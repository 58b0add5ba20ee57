"""What is trained on beside pre-training data."""

from __future__ import annotations

from collections.abc import Collection
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Field

from megarlx.config.distill import DistillConfig
from megarlx.config.environment import EnvironmentConfig
from megarlx.config.own_samples import FP8_GENERATOR, OwnSamplesConfig
from megarlx.config.policy import PolicyConfig
from megarlx.config.reward import RewardConfig
from megarlx.config.rollouts import (
    ROLLOUTS,
    BankConfig,
    RolloutFilter,
    TooLong,
    run_and_step,
    when_too_long,
)
from megarlx.config.section import Named, Section

PRETRAINING, SFT, RL = "pretraining", "sft", "rl"
PLACE = "{content}"
MADE = "{made}"  # in a path: the folder that data.maker writes


A_DAY = "expected a day as 2026-01-31"


def _is_date(text: str) -> bool:
    try:
        return not text or bool(date.fromisoformat(text))
    except ValueError:
        return False


class TemplateConfig(Section):
    """How turns are written for the model; {content} stands for a turn's text."""

    chat: str | None = Field(
        default=None,
        description="In place of the rest: the model's own chat template, in Jinja; a converted "
        "run has it",
    )
    bos: str = Field(default="", description="What chat calls bos_token")
    tokens: dict[str, str] = Field(
        default={}, description="What chat calls pad_token and so on; eos_token: the tokenizer's"
    )
    date: str = Field(
        default="",
        description="The day, as 2026-01-31, that chat is told is today; of a converted run that "
        "of its conversion",
    )
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
            found = [(name, "cannot be given together with chat") for name in said]
            return found + ([] if _is_date(self.date) else [("date", f"is {self.date!r}; {A_DAY}")])
        if self.user is None:
            return [("user", "is missing; give user, or chat")]
        found = [
            (name, f"is {text!r}; it must hold {PLACE} once")
            for name in ("user", "system", "assistant", "tool")
            if (text := getattr(self, name)).count(PLACE) != 1
        ]
        chats = [key for key in ("bos", "tokens", "date") if getattr(self, key)]
        return found + [(key, "is for chat, which is not given") for key in chats]


def unknown_template(name: str, known: Collection[str]) -> str:
    """What is wrong with the name of a template that is not there."""
    names = ", ".join(sorted(known)) or "none: [templates.NAME] makes one"
    return f"is {name!r}; allowed are the names in [templates]: {names}"


WRITE_TEMPLATE = r'write [template] with, for example, user = "Question: {content}\nAnswer:"'


class SftConfig(Section):
    """Supervised fine-tuning on conversations, or questions with answers."""

    conversations: str = Field(
        default="{made}/demonstrations.jsonl",
        description="JSONL file, one a line ({made}: data.maker's folder), or rollouts:RUN[@N], "
        "which a run kept",
    )
    filter: RolloutFilter = Field(
        default=RolloutFilter(), description="Which of the rollouts that conversations names"
    )
    template: str | None = Field(
        default=None, description="Name of one of [templates]; absent: [template]"
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
    too_long: TooLong | None = Field(
        default=None,
        description="Of conversations longer than a sequence; absent: stop, with rollouts skip",
    )

    @property
    def when_too_long(self) -> TooLong:
        return when_too_long(self.too_long, rollouts=self.rollouts is not None)

    @property
    def rollouts(self) -> tuple[str, int | None] | None:
        """Run and step, where conversations are its rollouts."""
        if not self.conversations.startswith(ROLLOUTS):
            return None
        return run_and_step(self.conversations.removeprefix(ROLLOUTS))

    def problems(self) -> list[tuple[str, str]]:
        given = self.conversations
        if given.startswith(ROLLOUTS):
            wrong = f"is {given!r}; allowed is rollouts:RUN or rollouts:RUN@N, N its step"
            return [] if self.rollouts else [("conversations", wrong)]
        if self.filter == RolloutFilter():
            return []
        return [("filter", f"is for conversations = 'rollouts:RUN'; they are {given!r}")]


class RlConfig(OwnSamplesConfig):
    """Policy optimisation on the model's own samples."""

    answer_key: str = Field(default="answer", description="Key of the reference answer in a line")
    examples: str | None = Field(
        default=None, description="JSONL of solved examples put before every question"
    )
    draw: Literal["shuffled", "difficulty"] = Field(
        default="shuffled",
        description="Each prompt once an epoch, or those that are half solved most often",
    )
    draw_floor: float = Field(
        default=0.05, gt=0, description="Added to p(1 - p), the weight of a prompt's draw"
    )
    draw_decay: float = Field(
        default=0.9, ge=0, lt=1, description="Of p, a prompt's running share of solved samples"
    )
    prompts_per_step: int = Field(default=16, ge=1, description="Prompts of one optimizer step")
    samples_per_prompt: int = Field(default=8, ge=2, description="Samples of each prompt: a group")
    steps_per_rollout: int = Field(
        default=1, ge=1, description="Steps whose prompts are sampled from one policy at once"
    )
    epochs_per_rollout: int = Field(default=1, ge=1, description="Times each sample is trained on")
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
    bank: BankConfig | None = Field(
        default=None, description="Every sample is kept in rollouts/; absent: none"
    )
    keep_samples_every_steps: int = Field(
        default=20, ge=1, description="Steps between samples written to samples/"
    )

    def problems(self) -> list[tuple[str, str]]:
        labels = [reward.label for reward in self.rewards]
        if not labels or len(set(labels)) < len(labels):
            given = ", ".join(labels) or "none"
            return [("rewards", f"are {given}; at least one is needed, each with its own name")]
        return [
            *self._problems_of_draw(),
            *self._problems_of_environment(),
            *self._problems_of_generator(),
        ]

    def _problems_of_generator(self) -> list[tuple[str, str]]:
        if self.generator != FP8_GENERATOR or self.policy.importance_cap is not None:
            return []
        needs = "its samples come from rounded weights, so it needs policy.importance_cap"
        return [("generator", f"is {FP8_GENERATOR!r}; {needs}, for example 2.0")]

    def _problems_of_draw(self) -> list[tuple[str, str]]:
        if self.draw == "difficulty":
            return []
        return [
            (key, f"is {given}; it is for draw = 'difficulty'")
            for key in ("draw_floor", "draw_decay")
            if (given := getattr(self, key)) != type(self).model_fields[key].default
        ]

    def _problems_of_environment(self) -> list[tuple[str, str]]:
        environment, policy = self.environment, self.policy
        if environment is None:
            if policy.advantage == "gigpo":
                return [("policy.advantage", "is 'gigpo'; it needs turns: [rl.environment]")]
            return []
        found = []
        if "rewards" in self.model_fields_set and self.rewards != type(self)().rewards:
            found.append(("rewards", "cannot be given with an environment, which has its own"))
        if self.bank is not None:
            found.append(
                ("bank", "keeps samples of questions; with an environment allowed is none")
            )
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
    def by_difficulty(self) -> tuple[float, float] | None:
        """Floor and decay, where prompts are drawn so."""
        return (self.draw_floor, self.draw_decay) if self.draw == "difficulty" else None

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


AnyObjective = SftConfig | RlConfig | DistillConfig | OwnConfig


class ObjectiveConfig(Section):
    """A further objective under a name of its own; exactly one of its tables is given."""

    sft: SftConfig | None = Field(default=None, description="Supervised fine-tuning")
    rl: RlConfig | None = Field(default=None, description="Policy optimisation")
    distill: DistillConfig | None = Field(default=None, description="Distillation")
    own: OwnConfig | None = Field(default=None, description="An objective of yours")

    @property
    def given(self) -> list[AnyObjective]:
        return [one for one in (self.sft, self.rl, self.distill, self.own) if one is not None]

    def problems(self) -> list[tuple[str, str]]:
        if len(self.given) != 1:
            return [("sft", "or rl, distill or own: exactly one of them must be given")]
        return []
