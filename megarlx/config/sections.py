"""The sections of a training configuration other than the model's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megarlx.config.model import ModelConfig
from megarlx.config.run_sections import CheckpointConfig, DataConfig, LoggingConfig
from megarlx.config.section import Section

# A list in TOML and in JSON is a tuple here: frozen like the rest. What is in it stays strict.
Layers = Annotated[int, Field(ge=0)]  # first and last stage have work without any
Beta = Annotated[float, Field(ge=0, lt=1)]


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


class OptimizerConfig(Section):
    """AdamW and the course of its learning rate."""

    lr: float = Field(
        default=4e-4, ge=0, description="Highest learning rate, reached after the warm-up"
    )
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = Field(
        default=(0.9, 0.95), description="Decay of the first and of the second moment at each step"
    )
    eps: float = Field(default=1e-8, gt=0, description="Added to the root of the second moment")
    weight_decay: float = Field(
        default=0.1, ge=0, description="Decoupled weight decay, scaled by the lr"
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


class TrainingConfig(Section):
    """How much is trained, in what pieces, on what."""

    steps: int = Field(ge=1, description="Optimizer steps of the whole run")
    sequences_per_step: int = Field(
        ge=1, description="Sequences in one optimizer step, over all processes"
    )
    sequences_per_microbatch: int = Field(
        default=1, ge=1, description="Sequences a process takes through the model at once"
    )
    sequence_length: int = Field(ge=1, description="Tokens of one training sequence")
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="Seed of the weights, the data order and the samples"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where the model runs; auto: cuda where there is a GPU"
    )
    precision: Literal["bf16", "fp32", "fp64"] = Field(
        default="fp32", description="Numbers the model computes in; bf16 keeps fp32 masters"
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none", description="Activations computed again in backward instead of kept"
    )


class Config(Section):
    """Everything a training run is told."""

    model: ModelConfig = Field(description="Shape of the transformer")
    layout: LayoutConfig = Field(default=LayoutConfig(), description="How processes share the work")
    optimizer: OptimizerConfig = Field(
        default=OptimizerConfig(), description="AdamW and the course of its learning rate"
    )
    training: TrainingConfig = Field(description="How much is trained, in what pieces")
    data: DataConfig | None = Field(default=None, description="What pre-training reads")
    checkpoints: CheckpointConfig = Field(
        default=CheckpointConfig(), description="When the run is saved, and what is kept"
    )
    logging: LoggingConfig = Field(
        default=LoggingConfig(), description="What is written down, and how often"
    )

    def problems(self) -> list[tuple[str, str]]:
        model, layout, optimizer, training = self.model, self.layout, self.optimizer, self.training
        found = []

        def wrong(field: str, what: str) -> None:
            found.append((field, what))

        if training.sequence_length > model.max_sequence_length:
            wrong(
                "training.sequence_length",
                f"is {training.sequence_length}; model.max_sequence_length allows at most "
                f"{model.max_sequence_length}",
            )
        if layout.stages > model.layers:
            wrong(
                "layout.pipeline",
                f"x virtual_stages = {layout.stages} stages; model.layers = {model.layers} "
                "allows at most one stage a layer",
            )
        if layout.layers_per_stage is not None and sum(layout.layers_per_stage) != model.layers:
            wrong(
                "layout.layers_per_stage",
                f"adds up to {sum(layout.layers_per_stage)}; model.layers is {model.layers}",
            )
        at_once = training.sequences_per_microbatch * (layout.data or 1)
        if training.sequences_per_step % at_once:
            below = training.sequences_per_step // at_once * at_once
            wrong(
                "training.sequences_per_step",
                f"is {training.sequences_per_step}; sequences_per_microbatch x layout.data = "
                f"{at_once} must divide it (nearest: "
                + " or ".join(str(n) for n in (below, below + at_once) if n > 0)
                + ")",
            )
        down = optimizer.warmup_steps + (optimizer.decay_steps or 0)
        if down > training.steps:
            wrong(
                "optimizer.warmup_steps",
                f"+ decay_steps = {down}; training.steps allows at most {training.steps}",
            )
        return found
