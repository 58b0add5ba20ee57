"""How an objective has the model write texts for it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megarlx.config.rollouts import TooLong, when_too_long
from megarlx.config.section import Named, Section

FP8_GENERATOR = "engine_fp8"  # it samples from rounded weights, and only rl corrects for them


def for_rl_alone(generator: str) -> list[tuple[str, str]]:
    """Problems of a section that is not rl."""
    if generator != FP8_GENERATOR:
        return []
    return [("generator", f"is {FP8_GENERATOR!r}, which is for rl; allowed: 'engine'")]


class OwnSamplesConfig(Section):
    """Prompts, and what a process does at once."""

    prompts: str = Field(
        default="{made}/prompts.jsonl",
        description="JSONL file, one prompt a line; {made}: data.maker's folder",
    )
    question_key: str = Field(default="question", description="Key of the question in a line")
    template: str | None = Field(
        default=None, description="Name of one of [templates]; absent: [template]"
    )
    max_completion_tokens: int = Field(default=128, ge=1, description="Longest completion")
    max_prompt_tokens: int | None = Field(
        default=None, ge=1, description="Longest prompt; absent: what the model allows"
    )
    too_long: TooLong | None = Field(
        default=None,
        description="Of prompts, or rollouts, longer than that; absent: stop, with rollouts skip",
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
    cache_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Most tokens in a process's caches; samples wait for room; absent: as many as "
        "all slots may fill",
    )

    @property
    def when_too_long(self) -> TooLong:
        return when_too_long(self.too_long, rollouts=False)

    @property
    def most_written_tokens(self) -> int:
        """Of one sample, by the model."""
        return self.max_completion_tokens
