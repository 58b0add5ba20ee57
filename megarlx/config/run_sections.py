"""The sections about a run's data, checkpoints and logs."""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Any, Literal

from pydantic import Field

from megarlx.config.rollouts import RolloutFilter, run_and_step
from megarlx.config.section import Named, OptionsOf, Section

Weights = dict[str, Annotated[float, Field(ge=0)]]


class SourceConfig(Section):
    """One token file, as megarlx prepare or Megatron writes it, or a run's rollouts."""

    name: str = Field(min_length=1, description="What the source is called in metrics")
    prefix: str | None = Field(
        default=None, description="Path of the token file without .bin or .idx"
    )
    rollouts: str | None = Field(
        default=None, description="RUN or RUN@N, whose rollouts are read in place of a file"
    )
    filter: RolloutFilter = Field(
        default=RolloutFilter(), description="Which of the rollouts are read"
    )
    weight: float = Field(default=1.0, ge=0, description="Share of the tokens, relative to others")

    def problems(self) -> list[tuple[str, str]]:
        if (self.prefix is None) == (self.rollouts is None):
            what = "is missing" if self.prefix is None else "and rollouts cannot both be given"
            return [("prefix", f"{what}; a token file or rollouts = 'RUN' is read")]
        if self.rollouts is not None and run_and_step(self.rollouts) is None:
            return [("rollouts", f"is {self.rollouts!r}; allowed is RUN or RUN@N, N its step")]
        if self.rollouts is None and self.filter != RolloutFilter():
            return [("filter", "is for rollouts = 'RUN', and a token file is given")]
        return []


class CompositionConfig(Section):
    """Weights that hold from a number of trained tokens on."""

    from_tokens: int = Field(ge=0, description="Tokens trained on before these weights hold")
    weights: Weights = Field(description="Share of each source, by its name; absent names get none")


RESERVED = 4  # tokens


class DataConfig(Section):
    """What is trained on: token files in given shares, which may change on the way."""

    maker: Annotated[str, Named("data maker")] | None = Field(
        default=None, description="What writes data; in place of sources, validation, tokenizer"
    )
    folder: str | None = Field(
        default=None, description="Where the maker writes; {NAME} stands for its option of the name"
    )
    options: Annotated[dict[str, Any], OptionsOf("data maker", "maker")] = Field(
        default={}, validate_default=True, description="What the maker is told; docs/data.md"
    )

    tokenizer: str | None = Field(
        default=None, description="'bytes', or a tokenizer's JSON file, kept with the run"
    )
    reserved_tokens: int = Field(
        default=RESERVED,
        ge=0,
        description="Unused ids of the model that a template may write: <reserved_0>, … ; as there "
        "is room",
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

    @property
    def place(self) -> str:
        """The folder, with the maker's options put in."""
        path = self.folder or ""
        for name, value in self.options.items():
            if isinstance(value, str | int | float):
                path = path.replace(f"{{{name}}}", str(value))
        return path

    def problems(self) -> list[tuple[str, str]]:
        found = []
        names = [source.name for source in self.sources]
        for field, sources in (("sources", self.sources), ("validation", self.validation)):
            given = [source.name for source in sources]
            if double := sorted({name for name in given if given.count(name) > 1}):
                found.append((field, f"uses the name {', '.join(double)} more than once"))
        if self.maker is not None:
            if self.folder is None:
                found.append(("folder", f"is missing; {self.maker} writes what it makes there"))
            files = any(source.rollouts is None for source in self.sources)
            given = ["sources"] if files else []
            given += [f for f in ("validation", "tokenizer") if getattr(self, f)]
            together = "cannot be given together with data.maker, which sets it"
            return found + [(field, together) for field in given]
        given = [field for field in ("folder", "options") if getattr(self, field)]
        found += [(field, "is for what data.maker names, and it names nothing") for field in given]
        if not self.sources:
            found.append(("sources", "is empty; give [[data.sources]] tables, or a maker"))
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
    average_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Of a moving average of the weights, saved beside them; absent: none",
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
