"""What a model is measured with: suites of questions, tests and prompts."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from megarlx.config.environment import EnvironmentConfig
from megarlx.config.objectives import TemplateConfig
from megarlx.config.reward import RewardConfig
from megarlx.config.section import Section

Kind = Literal["pass_at_k", "choice", "cloze", "perplexity", "behaviour", "agent"]
WorldTests = Literal["problems", "facts", "held_out_facts", "stories", "behaviours"]
Count = Annotated[int, Field(ge=1)]

# What of a synthetic world each kind of suite can be made of
OF_THE_WORLD: dict[str, tuple[str, ...]] = {
    "pass_at_k": ("problems",),
    "choice": ("facts", "held_out_facts"),
    "cloze": ("facts", "held_out_facts"),
    "perplexity": ("problems", "facts", "stories"),
    "behaviour": ("behaviours",),
    "agent": (),
}
SAMPLED = ("pass_at_k", "behaviour", "agent")
SCORED = ("pass_at_k", "behaviour")  # by rewards


class SuiteConfig(Section):
    """One suite: what is asked, how often, and what counts."""

    name: str = Field(min_length=1, description="Name of the suite in files, metrics and figures")
    kind: Kind = Field(description="How it is measured: by scored samples, or by likelihoods")
    path: str | None = Field(default=None, description="JSONL file of its questions")
    world: WorldTests | None = Field(
        default=None, description="In place of a path: tests of the run's own synthetic world"
    )
    question_key: str = Field(default="question", description="Field of a line with the question")
    answer_key: str = Field(default="answer", description="Field of a line with the reference")
    templated: bool = Field(
        default=True, description="Whether questions are put into the template; no: as they stand"
    )
    questions: int | None = Field(
        default=None, ge=1, description="At most so many questions, the first; absent: all"
    )
    split: Literal["validation", "test"] = Field(
        default="test", description="Split of the world's problems: choose on one, report the other"
    )

    max_prompt_tokens: int | None = Field(
        default=None, ge=1, description="Questions whose prompts are longer are left out"
    )

    samples: int = Field(default=64, ge=1, description="Samples of each question")
    ks: Annotated[tuple[Count, ...], Field(strict=False)] = Field(
        default=(1, 8, 32), description="The k of pass@k; those above `samples` are left out"
    )
    temperature: float = Field(default=0.6, ge=0, description="Temperature of sampling; 0: greedy")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Share of the probability kept")
    max_new_tokens: int = Field(default=256, ge=1, description="Longest completion")
    stop_strings: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(), description="Texts that end a completion, and are cut off it"
    )

    few_shot: int = Field(
        default=0, ge=0, description="Solved examples shown to a model that is pre-trained only"
    )
    few_shot_trained: int = Field(
        default=0, ge=0, description="Solved examples shown to a model after SFT or RL"
    )
    few_shot_path: str | None = Field(
        default=None, description="JSONL of question and answer, or messages; not for worlds"
    )
    few_shot_separator: str | None = Field(
        default=None, description="Text behind each example; absent: the token ending a document"
    )
    few_shot_style: str | None = Field(
        default=None, description="Style of a world's examples; absent: the demonstrations' style"
    )

    environment: EnvironmentConfig | None = Field(
        default=None, description="What the tasks of an agent suite are played in"
    )
    rewards: Annotated[tuple[RewardConfig, ...], Field(strict=False)] = Field(
        default=(), description="What scores a sample; absent: final_number, or the world's own"
    )
    correct_from: float = Field(
        default=1.0, description="Least total reward of a correct sample, for pass_at_k"
    )
    violation_below: float = Field(
        default=0.5, description="Total reward below which a sample is a violation, for behaviour"
    )
    group_size: int | None = Field(
        default=None, ge=2, description="Also the share of groups so large that RL can learn from"
    )

    choices: int | None = Field(
        default=None, ge=2, description="Answers to choose among in a world's choice; absent: its"
    )
    normalise: Literal["none", "bytes", "tokens"] = Field(
        default="none", description="What an answer's log-likelihood is divided by in a choice"
    )

    @property
    def uses_template(self) -> bool:
        """Whether anything that the model is shown is written in the template."""
        if self.kind not in SCORED:
            return self.kind == "agent"
        shots = max(self.few_shot, self.few_shot_trained)
        return self.world != "behaviours" and (self.templated or shots > 0)

    def problems(self) -> list[tuple[str, str]]:
        found = []
        if re.fullmatch(r"[\w-]+", self.name, re.ASCII) is None:
            found.append(("name", f"is '{self.name}'; allowed are letters, digits, _ and -"))
        if (self.environment is not None) != (self.kind == "agent"):
            found.append(("environment", "is needed for kind = 'agent', and for that only"))
        if (self.path is None) == (self.world is None):
            found.append(("path", "or world is needed, and not both of them"))
        allowed = OF_THE_WORLD[self.kind]
        if self.world is not None and self.world not in allowed:
            found.append(
                (
                    "world",
                    f"is '{self.world}'; a {self.kind} suite can use "
                    + (", ".join(allowed) or "a path only"),
                )
            )
        if self.kind == "pass_at_k" and min(self.ks, default=1) > self.samples:
            found.append(("ks", f"are {list(self.ks)}; samples = {self.samples} allows none"))
        if not self.ks:
            found.append(("ks", "is empty"))
        if self.group_size is not None and self.group_size > self.samples:
            found.append(("group_size", f"is {self.group_size}; samples is {self.samples}"))
        shots = max(self.few_shot, self.few_shot_trained)
        if shots and self.path is not None and self.few_shot_path is None:
            found.append(("few_shot_path", f"is missing; {shots} examples are to be shown"))
        if self.kind == "behaviour" and self.path is not None and not self.rewards:
            found.append(("rewards", "are missing; a behaviour is what a reward says it is"))
        if self.kind not in SCORED:
            for field in ("rewards", "few_shot", "few_shot_trained", "max_prompt_tokens"):
                if getattr(self, field):
                    found.append((field, f"is for {' and '.join(SCORED)}, not for {self.kind}"))
        if self.kind not in SAMPLED and self.group_size:
            found.append(("group_size", f"is for {' and '.join(SAMPLED)}, not for {self.kind}"))
        return found


class EvaluationConfig(Section):
    """The suites of a run, and how they are computed."""

    suites: Annotated[tuple[SuiteConfig, ...], Field(strict=False)] = Field(
        default=(), description="What is measured, each a [[…suites]] table"
    )
    every_steps: int | None = Field(
        default=None, ge=1, description="Steps between evaluations while training; absent: none"
    )
    at_end: bool = Field(default=False, description="Whether the last step is evaluated as well")
    readiness_prompts: int = Field(
        default=32,
        ge=0,
        description="Of RL's prompts, the first so many are tried before RL begins; 0: no probe",
    )
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="Seed of samples and few-shot examples"
    )
    slots: int = Field(default=256, ge=1, description="Sequences generated at once")
    prefill_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Prompt tokens taken through the model at once; absent: 16,384 on a "
        "GPU, 1,024 on a CPU",
    )
    tokens_per_pass: int = Field(
        default=4096, ge=64, description="Tokens whose likelihood is computed at once"
    )
    kept_samples: int = Field(
        default=2, ge=0, description="Samples of each question that are written to samples/"
    )

    def problems(self) -> list[tuple[str, str]]:
        names = [suite.name for suite in self.suites]
        double = sorted({name for name in names if names.count(name) > 1})
        return [("suites", f"use the name {', '.join(double)} more than once")] if double else []


class SuitesConfig(EvaluationConfig):
    """A file of suites, for any run."""

    template: TemplateConfig | None = Field(
        default=None, description="How questions and answers are written; absent: as the run says"
    )


def world_suites() -> EvaluationConfig:
    """Every kind of test that a synthetic world has, where no suites are given."""
    return EvaluationConfig(
        suites=(
            SuiteConfig(name="problems", kind="pass_at_k", world="problems", max_new_tokens=70),
            SuiteConfig(name="facts_choice", kind="choice", world="held_out_facts"),
            SuiteConfig(name="facts_cloze", kind="cloze", world="held_out_facts"),
            SuiteConfig(name="stories", kind="perplexity", world="stories"),
        )
    )
