"""How the processes of a run share the work."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megarlx.config.section import Section

# A list in TOML and in JSON is a tuple here: frozen like the rest. What is in it stays strict.
Layers = Annotated[int, Field(ge=0)]  # first and last stage have work without any


# Stages on each pipeline process that a schedule allows: at least, at most.
VIRTUAL_STAGES: dict[str, tuple[int, int | None]] = {
    "1f1b": (1, 1),
    "interleaved": (2, None),
    "zero_bubble": (1, None),
    "zbv": (2, 2),
}


class LayoutConfig(Section):
    """How the processes share the work. Processes = pipeline x replica x data x tensor."""

    tensor: int = Field(default=1, ge=1, description="Processes that share each layer's matrices")
    pipeline: int = Field(
        default=1, ge=1, description="Processes in a row that each hold some layers"
    )
    data: int | None = Field(
        default=None,
        ge=1,
        description="Processes that take different sequences; absent: all that are left",
    )
    replica: int = Field(
        default=1,
        ge=1,
        description="Groups of processes that run one objective each of an average stage",
    )
    sequence_parallel: bool = Field(
        default=False,
        description="Whether the tensor group also splits activations along the sequence",
    )
    schedule: Literal["1f1b", "interleaved", "zero_bubble", "zbv"] = Field(
        default="1f1b", description="Order of forwards and backwards in the pipeline"
    )
    virtual_stages: int = Field(
        default=1, ge=1, description="Pipeline stages held by each pipeline process"
    )
    layers_per_stage: Annotated[tuple[Layers, ...], Field(strict=False)] | None = Field(
        default=None, description="Layers of each stage, first to last; absent: as even as can be"
    )
    time_limit_seconds: float = Field(
        default=600.0,
        gt=0,
        description="Longest wait for other processes before an error names them",
    )

    @property
    def stages(self) -> int:
        return self.pipeline * self.virtual_stages

    def problems(self) -> list[tuple[str, str]]:
        found = []
        least, most = VIRTUAL_STAGES[self.schedule]
        if not least <= self.virtual_stages <= (most or self.virtual_stages):
            allowed = f"allowed is {least}" if most == least else f"at least {least}"
            found.append(
                (
                    "virtual_stages",
                    f"is {self.virtual_stages}; with schedule = '{self.schedule}' {allowed}",
                )
            )
        if self.schedule != "1f1b" and self.pipeline == 1:
            found.append(("schedule", f"is '{self.schedule}'; it needs pipeline of at least 2"))
        if self.layers_per_stage is not None and len(self.layers_per_stage) != self.stages:
            found.append(
                (
                    "layers_per_stage",
                    f"has {len(self.layers_per_stage)} entries; pipeline x virtual_stages = "
                    f"{self.stages} stages need one each",
                )
            )
        return found
