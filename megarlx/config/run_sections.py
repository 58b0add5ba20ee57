"""The sections about a run's data, checkpoints and logs."""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Any, Literal

from pydantic import Field

from megarlx.config.section import Section

Weights = dict[str, Annotated[float, Field(ge=0)]]


class SourceConfig(Section):
    """One token file, as tools/prepare_tokens.py or Megatron writes it."""

    name: str = Field(min_length=1, description="What the source is called in metrics")
    prefix: str = Field(description="Path of the token file without .bin or .idx")
    weight: float = Field(default=1.0, ge=0, description="Share of the tokens, relative to others")


class CompositionConfig(Section):
    """Weights that hold from a number of trained tokens on."""

    from_tokens: int = Field(ge=0, description="Tokens trained on before these weights hold")
    weights: Weights = Field(description="Share of each source, by its name; absent names get none")


class WorldConfig(Section):
    """A synthetic world, written as token files before training where they are not there yet."""

    folder: str = Field(
        description="Where its files are; {seed}, {problems_share} and the like: their values"
    )
    seed: int = Field(default=0, ge=0, description="Seed of the world: its facts and its problems")
    documents: int = Field(
        default=40_000, ge=1, description="Training documents, shared out by the kinds' weights"
    )
    held_out_documents: int = Field(
        default=500, ge=1, description="Validation documents of each kind"
    )
    problems_share: float = Field(default=0.52, ge=0, description="Share of word problems")
    facts_share: float = Field(default=0.38, ge=0, description="Share of general knowledge")
    stories_share: float = Field(default=0.10, ge=0, description="Share of short stories")
    prompts: int = Field(default=1024, ge=1, description="Questions in prompts.jsonl, to learn on")
    test_questions: int = Field(
        default=256, ge=1, description="Questions in test.jsonl and in validation.jsonl each"
    )
    settings: dict[str, Any] = Field(
        default={}, description="Knobs of the world by name; docs/data.md lists them"
    )

    @property
    def place(self) -> str:
        path = self.folder
        for name in ("seed", "documents", "problems_share", "facts_share", "stories_share"):
            path = path.replace(f"{{{name}}}", str(getattr(self, name)))
        return path


class PlaceConfig(Section):
    """An environment whose tasks and demonstrations are written."""

    function: str = Field(description="As in [rl.environment]; one that comes with megarlx")
    name: str | None = Field(
        default=None, pattern=r"^[\w-]+$", description="Of its folder; absent: the class's"
    )
    options: dict[str, Any] = Field(default={}, description="Keyword arguments of the class")
    max_turns: int = Field(default=8, ge=1, description="Demonstrations end before that many")
    tasks: int = Field(default=1024, ge=1, description="Tasks to learn on")
    test_tasks: int = Field(
        default=128, ge=1, description="Tasks for tests and for validation, each"
    )
    demonstrations: int = Field(
        default=256, ge=1, description="Episodes of the solver, for a supervised cold start"
    )
    mistakes: float = Field(
        default=0.0, ge=0, lt=1, description="Share of a demonstration's actions drawn at random"
    )
    solved_only: bool = Field(
        default=True, description="Whether demonstrations that end without success are left out"
    )

    @property
    def label(self) -> str:
        return self.name or self.function.rpartition(":")[2]


class AgentsConfig(Section):
    """Tasks and demonstrations of environments, written where they are not there yet."""

    folder: str = Field(description="Where they are written and looked for: {world} in paths")
    seed: int = Field(default=0, ge=0, description="Seed of the demonstrations' mistakes")
    environments: Annotated[tuple[PlaceConfig, ...], Field(strict=False)] = Field(
        description="Each a [[data.agents.environments]] table"
    )

    @property
    def place(self) -> str:
        return self.folder

    def problems(self) -> list[tuple[str, str]]:
        labels = [place.label for place in self.environments]
        if not labels or len(set(labels)) < len(labels):
            given = ", ".join(labels) or "none"
            return [("environments", f"are {given}; needed is one or more, each with its name")]
        return []


class DataConfig(Section):
    """What is trained on: token files in given shares, which may change on the way."""

    world: WorldConfig | None = Field(
        default=None, description="A synthetic world in place of sources, validation, tokenizer"
    )
    agents: AgentsConfig | None = Field(
        default=None, description="Environments' tasks, demonstrations and words, in place of them"
    )

    tokenizer: str | None = Field(
        default=None, description="'bytes', or a tokenizer's JSON file, kept with the run"
    )
    sources: Annotated[tuple[SourceConfig, ...], Field(strict=False)] = Field(
        default=(), description="Token files, each a [[data.sources]] table"
    )
    composition: Annotated[tuple[CompositionConfig, ...], Field(strict=False)] = Field(
        default=(), description="A schedule of weights in place of the sources' own"
    )
    validation: Annotated[tuple[SourceConfig, ...], Field(strict=False)] = Field(
        default=(), description="Token files whose loss is measured, never trained on"
    )
    documents_apart: bool = Field(
        default=False, description="Whether attention stays inside a document of a sequence"
    )

    def problems(self) -> list[tuple[str, str]]:
        found = []
        names = [source.name for source in self.sources]
        for field, sources in (("sources", self.sources), ("validation", self.validation)):
            given = [source.name for source in sources]
            if double := sorted({name for name in given if given.count(name) > 1}):
                found.append((field, f"uses the name {', '.join(double)} more than once"))
        for maker in ("world", "agents"):
            if getattr(self, maker) is None:
                continue
            fields = ("world", "sources", "validation", "tokenizer")
            given = [f for f in fields if getattr(self, f) and f != maker]
            return [
                (f, f"cannot be given together with data.{maker}, which sets it") for f in given
            ]
        if not self.sources:
            found.append(("sources", "is empty; give [[data.sources]] tables, or [data.world]"))
        elif not self.composition and sum(source.weight for source in self.sources) <= 0:
            found.append(("sources", "have no weight above 0"))
        starts = [part.from_tokens for part in self.composition]
        if starts and (starts[0] != 0 or any(b <= a for a, b in itertools.pairwise(starts))):
            found.append(("composition", f"has from_tokens {starts}; it must rise from 0"))
        for part in self.composition:
            if unknown := sorted(set(part.weights) - set(names)):
                found.append(
                    (
                        "composition",
                        f"names {', '.join(unknown)}; sources are {', '.join(names)}",
                    )
                )
            if not math.fsum(part.weights.values()) > 0:
                found.append(("composition", f"from {part.from_tokens} tokens has no weight"))
        return found


Count = Annotated[int, Field(ge=1)]


class CheckpointConfig(Section):
    """When the run is saved, and what is kept."""

    save_every_steps: int | None = Field(
        default=None, ge=1, description="Steps between checkpoints; absent: only at the end"
    )
    save_at_tokens: Annotated[tuple[Count, ...], Field(strict=False)] = Field(
        default=(), description="Token counts at whose first step past them to save; always kept"
    )
    keep_last: int | None = Field(
        default=None, ge=1, description="Newest checkpoints that are kept; absent: all"
    )
    keep_every_steps: int | None = Field(
        default=None, ge=1, description="Checkpoints at multiples of this are kept besides"
    )
    in_background: bool = Field(
        default=True, description="Whether training goes on while a checkpoint is written"
    )


class LoggingConfig(Section):
    """What is written down, how often, and when the run stops by itself."""

    log_every_steps: int = Field(default=10, ge=1, description="Steps between lines of metrics")
    validate_every_steps: int | None = Field(
        default=None, ge=1, description="Steps between validations; absent: only at the end"
    )
    validation_sequences: int = Field(
        default=64, ge=1, description="Sequences of each validation source that are measured"
    )
    compare_replicas_every_steps: int | None = Field(
        default=100, ge=1, description="Steps between comparisons of the weights of data replicas"
    )
    skipped_updates_allowed: int = Field(
        default=10, ge=0, description="Non-finite gradients in a row after which the run stops"
    )
    trackers: Annotated[tuple[Literal["wandb", "mlflow"], ...], Field(strict=False)] = Field(
        default=(), description="Services that get the metrics too; pip install 'megarlx[wandb]'"
    )
    tracker_project: str = Field(
        default="megarlx", min_length=1, description="Project, or experiment, that runs belong to"
    )
    stop_after_minutes: float | None = Field(
        default=None, gt=0, description="Minutes after which the run saves and stops; absent: never"
    )
