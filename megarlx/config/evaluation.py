"""What a model is measured with: suites of questions, tests and prompts."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field

from megarlx import plug
from megarlx.config.environment import EnvironmentConfig
from megarlx.config.objectives import TemplateConfig
from megarlx.config.own_samples import for_rl_alone
from megarlx.config.reward import RewardConfig
from megarlx.config.section import Named, Section

Count = Annotated[int, Field(ge=1)]

SAMPLED = ("pass_at_k", "behaviour", "agent")
SCORED = ("pass_at_k", "behaviour")  # by rewards


class SuiteConfig(Section):
    """One suite: what is asked, how often, and what counts."""

    name: str = Field(min_length=1, description="Name of the suite in files, metrics and figures")
    kind: Annotated[str, Named("suite")] = Field(
        description="How it is measured: by scored samples, by likelihoods, or your own way"
    )
    path: str | None = Field(default=None, description="JSONL file of its questions")
    made: str | None = Field(
        default=None, description="In place of a path: the suite of that name of data.maker"
    )
    options: dict[str, Any] = Field(
        default={}, description="What a made suite, or a kind of your own, is told besides"
    )
    question_key: str = Field(default="question", description="Field of a line with the question")
    answer_key: str = Field(default="answer", description="Field of a line with the reference")
    templated: bool = Field(
        default=True, description="Whether questions are put into the template; no: as they stand"
    )
    template: str | None = Field(
        default=None, description="Name of one of [templates]; absent: [template]"
    )
    questions: int | None = Field(
        default=None, ge=1, description="At most so many questions, the first; absent: all"
    )
    split: Literal["validation", "test", "compositions"] = Field(
        default="test",
        description="Split of what is made: choose on one, report the other; or held-out ones",
    )

    max_prompt_tokens: int | None = Field(
        default=None, ge=1, description="Questions whose prompts are longer are left out"
    )

    samples: int = Field(default=64, ge=1, description="Samples of each question")
    ks: Annotated[tuple[Count, ...], Field(strict=False)] = Field(
        default=(1, 8, 32), description="The k of pass@k; those above `samples` are left out"
    )
    generator: Annotated[str, Named("generator")] = Field(
        default="engine", description="What draws the samples"
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
        default=None, description="JSONL of question and answer, or messages; not for made ones"
    )
    few_shot_separator: str | None = Field(
        default=None, description="Text behind each example; absent: the token ending a document"
    )

    environment: EnvironmentConfig | None = Field(
        default=None, description="What the tasks of an agent suite are played in"
    )
    rewards: Annotated[tuple[RewardConfig, ...], Field(strict=False)] = Field(
        default=(), description="What scores a sample; absent: final_number, or the made suite's"
    )
    correct_from: float = Field(
        default=1.0, description="Least total reward of a correct sample, for pass_at_k"
    )
    form: Annotated[str, Named("reward")] | None = Field(
        default=None,
        description="Reward for an answer's form, for pass_at_k: how many have it, and are right",
    )
    violation_below: float = Field(
        default=0.5, description="Total reward below which a sample is a violation, for behaviour"
    )
    group_size: int | None = Field(
        default=None, ge=2, description="Also the share of groups so large that RL can learn from"
    )

    normalise: Literal["none", "bytes", "tokens"] = Field(
        default="none", description="What an answer's log-likelihood is divided by in a choice"
    )

    @property
    def is_ours(self) -> bool:
        return self.kind in plug.ours("suite")

    @property
    def uses_template(self) -> bool:
        """Whether anything that the model is shown is written in the template; a kind of a user's
        own may do without one."""
        if self.kind not in SCORED:
            return self.kind == "agent"
        return self.templated or max(self.few_shot, self.few_shot_trained) > 0

    def problems(self) -> list[tuple[str, str]]:
        found = []
        if re.fullmatch(r"[\w-]+", self.name, re.ASCII) is None:
            found.append(("name", f"is '{self.name}'; allowed are letters, digits, _ and -"))
        if self.path is not None and self.made is not None:
            found.append(("path", "and made cannot be given together"))
        found += for_rl_alone(self.generator)
        return found + (self._problems_of_ours() if self.is_ours else [])

    def _problems_of_ours(self) -> list[tuple[str, str]]:
        found = []
        if (self.environment is not None) != (self.kind == "agent"):
            found.append(("environment", "is needed for kind = 'agent', and for that only"))
        if self.path is None and self.made is None:
            found.append(("path", "or made is needed"))
        if self.options and self.made is None:
            found.append(("options", f"are for what is made, and for kinds other than {self.kind}"))
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
        if self.template is not None and not self.uses_template:
            found.append(("template", f"is {self.template!r}; this suite asks in none"))
        if self.kind not in SCORED:
            for field in ("rewards", "few_shot", "few_shot_trained", "max_prompt_tokens"):
                if getattr(self, field):
                    found.append((field, f"is for {' and '.join(SCORED)}, not for {self.kind}"))
        if self.form is not None and self.kind != "pass_at_k":
            found.append(("form", f"is for pass_at_k, not for {self.kind}"))
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
    at_steps: Annotated[tuple[Count, ...], Field(strict=False)] = Field(
        default=(), description="Steps behind which it is evaluated besides"
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

    @property
    def while_training(self) -> bool:
        return self.at_end or bool(self.at_steps) or self.every_steps is not None

    def problems(self) -> list[tuple[str, str]]:
        names = [suite.name for suite in self.suites]
        double = sorted({name for name in names if names.count(name) > 1})
        return [("suites", f"use the name {', '.join(double)} more than once")] if double else []


class SuitesConfig(EvaluationConfig):
    """A file of suites, for any run."""

    template: TemplateConfig | None = Field(
        default=None, description="How questions and answers are written; absent: as the run says"
    )
    templates: dict[str, TemplateConfig] = Field(
        default={}, description="Further templates by name, beside those of the run"
    )
