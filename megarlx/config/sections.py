"""The sections of a training configuration other than the model's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megarlx import plug
from megarlx.config.batch import uneven
from megarlx.config.distill import DistillConfig
from megarlx.config.evaluation import SAMPLED, EvaluationConfig
from megarlx.config.layout import LayoutConfig
from megarlx.config.model import ModelConfig
from megarlx.config.objectives import (
    PRETRAINING,
    RL,
    SFT,
    WRITE_TEMPLATE,
    AnyObjective,
    ObjectiveConfig,
    RlConfig,
    SftConfig,
    TemplateConfig,
    unknown_template,
)
from megarlx.config.optimizer import OptimizerConfig, merged
from megarlx.config.run_sections import CheckpointConfig, DataConfig, LoggingConfig
from megarlx.config.section import Section, may_import
from megarlx.config.stages import StageConfig, StageObjective
from megarlx.config.timeline import Timeline

MODEL = "model"  # the name of a model's own chat template among [templates]
# Names that no objective may have: of ours, and of states that are no objective's.
TAKEN = {PRETRAINING, SFT, RL, "shared", "outer"}


class TrainingConfig(Section):
    """How much is trained, in what pieces, on what."""

    steps: int | None = Field(
        default=None, ge=1, description="Steps of pre-training, in place of [[stages]]"
    )
    sequences_per_step: int = Field(
        default=16, ge=1, description="Sequences in one optimizer step, over all processes"
    )
    sequences_per_microbatch: int = Field(
        default=1, ge=1, description="Sequences a process takes through the model at once"
    )
    sequence_length: int = Field(ge=1, description="Tokens of one training sequence")
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="Seed of the weights, the data order and the samples"
    )
    z_loss: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the square of log Σ exp(logits) in pre-training's and SFT's loss",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where the model runs; auto: cuda where there is a GPU"
    )
    precision: Literal["auto", "bf16", "fp32", "fp64"] = Field(
        default="auto",
        description="Numbers the model computes in; auto: bf16 (with fp32 masters) on a GPU, "
        "else fp32",
    )
    tf32: bool = Field(
        default=True,
        description="Whether fp32 products on a GPU round their inputs to TF32, 7 times as fast",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none", description="Activations computed again in backward instead of kept"
    )
    layers: Literal["auto", "torch", "te"] = Field(
        default="auto",
        description="What layers are made of: torch, or te: Transformer Engine; auto: te where "
        "it can be had",
    )
    attention: Literal["auto", "cudnn", "flash", "sdpa", "blocks"] = Field(
        default="auto",
        description="cudnn, flash (flash-attn), sdpa (torch's), blocks (serves everything); auto: "
        "the first that serves",
    )
    fp8: Literal["none", "delayed", "current", "block", "mxfp8"] = Field(
        default="none", description="Scaling of fp8 matrix products; needs layers = 'te'"
    )
    capture_below_parameters: int = Field(
        default=150_000_000,
        ge=0,
        description="Models with fewer pre-train and fine-tune on a GPU as CUDA graphs; 0: none",
    )
    kept_gradients_mib: int = Field(
        default=0,
        ge=0,
        description="MiB for the gradients by all logits; where they fit, the head's weight "
        "gradient is one product",
    )

    def problems(self) -> list[tuple[str, str]]:
        found = []
        if self.layers == "te" and self.device == "cpu":
            found.append(("layers", "is 'te', Transformer Engine, which runs on CUDA alone"))
        if self.attention in ("cudnn", "flash") and self.device == "cpu":
            found.append(("attention", f"is '{self.attention}', which runs on CUDA alone"))
        half = ("auto", "bf16")
        if self.attention in ("cudnn", "flash") and self.precision not in half:
            given = f"is '{self.attention}' with precision = '{self.precision}'"
            found.append(("attention", f"{given}; it needs 'bf16'"))
        if self.fp8 != "none" and (self.layers == "torch" or self.precision not in half):
            given = f"layers = '{self.layers}' and precision = '{self.precision}'"
            found.append(("fp8", f"is '{self.fp8}' with {given}; it needs 'te' and 'bf16'"))
        return found


def _no_lr(stage: str, name: str, objective: StageObjective) -> str:
    return (
        f"is missing: in stage '{stage}' '{name}' would train as pre-training does by default, "
        f"with lr = {objective.lr:g}, weight_decay = {objective.weight_decay:g} and schedule = "
        f"'{objective.schedule}'; write lr = 1e-6, or what suits it, in its table or in [optimizer]"
    )


class Config(Section):
    """Everything a training run is told."""

    model: ModelConfig = Field(description="Shape of the transformer")
    layout: LayoutConfig = Field(default=LayoutConfig(), description="How processes share the work")
    optimizer: OptimizerConfig = Field(
        default=OptimizerConfig(),
        description="AdamW and the course of its learning rate, where a stage gives none",
    )
    training: TrainingConfig = Field(description="How much is trained, in what pieces")
    data: DataConfig | None = Field(default=None, description="What pre-training reads")
    template: TemplateConfig | None = Field(
        default=None,
        description="How questions and answers are written; absent: as data.maker writes them",
    )
    templates: dict[str, TemplateConfig] = Field(
        default={},
        description="Further templates by name, for objectives and suites that say template = NAME",
    )
    sft: SftConfig | None = Field(default=None, description="The objective 'sft'")
    rl: RlConfig | None = Field(default=None, description="The objective 'rl'")
    objectives: dict[str, ObjectiveConfig] = Field(
        default={},
        description="Further objectives by name, each with an sft, rl, distill or own table",
    )
    stages: Annotated[tuple[StageConfig, ...], Field(strict=False)] = Field(
        default=(), description="What is trained in turn, each a [[stages]] table"
    )
    evaluation: EvaluationConfig = Field(
        default=EvaluationConfig(), description="What checkpoints are measured with"
    )
    checkpoints: CheckpointConfig = Field(
        default=CheckpointConfig(), description="When the run is saved, and what is kept"
    )
    logging: LoggingConfig = Field(
        default=LoggingConfig(), description="What is written down, and how often"
    )

    @model_validator(mode="before")
    @classmethod
    def _optimizer_under_stages(cls, given: Any) -> Any:
        """What a stage does not say about an objective's optimizer, [optimizer] says."""
        if not isinstance(given, Mapping) or not isinstance(given.get("optimizer"), Mapping):
            return given
        stages = given.get("stages")
        if not isinstance(stages, list | tuple):
            return given

        def whole(stage: Any) -> Any:
            if not isinstance(stage, Mapping) or not isinstance(stage.get("objectives"), Mapping):
                return stage
            objectives = {
                name: merged(given["optimizer"], own) if isinstance(own, Mapping) else own
                for name, own in stage["objectives"].items()
            }
            return {**stage, "objectives": objectives}

        return {**given, "stages": [whole(stage) for stage in stages]}

    @model_validator(mode="before")
    @classmethod
    def _template_of_maker(cls, given: Any) -> Any:
        """A maker whose options ask for the template is told it; where there is none, it says how
        what it makes is put."""
        data = given.get("data") if isinstance(given, Mapping) else None
        if not isinstance(data, Mapping) or not isinstance(name := data.get("maker"), str):
            return given
        if not may_import("data maker", name):
            return given
        try:
            maker = plug.resolve("data maker", name)
            asks = "template" in maker.Options.model_fields
        except (plug.PlugError, AttributeError):
            return given  # the section [data] tells it
        template, options = given.get("template"), data.get("options") or {}
        if template is None and maker.template is not None:
            given = {**given, "template": maker.template}
        elif asks and isinstance(options, Mapping) and options.get("template") is None:
            given = {**given, "data": {**data, "options": {**options, "template": template}}}
        return given

    @model_validator(mode="before")
    @classmethod
    def _template_of_model(cls, given: Any) -> Any:
        """A model's own chat template has a name, by which it stays below another [template]."""
        template = given.get("template") if isinstance(given, Mapping) else None
        if not isinstance(template, Mapping) or template.get("chat") is None:
            return given
        named = given.get("templates", {})
        if isinstance(named, Mapping):
            given = {**given, "templates": {MODEL: template, **named}}
        return given

    @property
    def named_objectives(self) -> dict[str, AnyObjective]:
        """Every objective but pre-training, by name."""
        found: dict[str, AnyObjective] = {}
        if self.sft is not None:
            found[SFT] = self.sft
        if self.rl is not None:
            found[RL] = self.rl
        return found | {name: one.given[0] for name, one in self.objectives.items()}

    @property
    def all_stages(self) -> tuple[StageConfig, ...]:
        """[[stages]], or the one that training.steps stands for."""
        if self.stages:
            return self.stages
        assert self.training.steps is not None
        only = StageObjective.model_validate(self.optimizer.model_dump())
        return (StageConfig(steps=self.training.steps, objectives={PRETRAINING: only}),)

    @property
    def timeline(self) -> Timeline:
        return Timeline([stage.times for stage in self.all_stages])

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self.all_stages)

    def problems(self) -> list[tuple[str, str]]:
        model, layout, training = self.model, self.layout, self.training
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
        if layout.schedule == "zbv" and (samplers := self._samplers()):
            wrong(
                "layout.schedule",
                f"is 'zbv', whose last stage is on the first rank; {samplers} generates text and "
                "needs 1f1b, interleaved or zero_bubble",
            )
        at_once = training.sequences_per_microbatch * (layout.data or 1)
        if said := uneven(training.sequences_per_step, at_once, "layout.data"):
            wrong("training.sequences_per_step", said)
        found += self._problems_of_templates()
        if self.template is None and (needs := self._needs_template()):
            wrong("template", f"is missing, and {needs} is written in it; {WRITE_TEMPLATE}")
        return found + self._problems_of_stages()

    def _problems_of_templates(self) -> list[tuple[str, str]]:
        """Names of templates that are not known, of objectives and of suites."""
        places = {
            **{name if name in (SFT, RL) else f"objectives.{name}": one
               for name, one in self.named_objectives.items()},
            **{f"evaluation.suites.{at}": one for at, one in enumerate(self.evaluation.suites)},
        }  # fmt: skip
        found = [
            (f"{place}.template", unknown_template(name, self.templates))
            for place, one in places.items()
            if (name := getattr(one, "template", None)) is not None
            if name not in self.templates
        ]
        own = self.templates.get(MODEL)
        if own is not None and own.chat is None:
            kept = "has no chat; the name is kept for the model's own chat template"
            found.append((f"templates.{MODEL}", kept))
        return found

    def _needs_template(self) -> str:
        """What of the run is written in the template, if anything."""
        if self.data is not None and self.data.options.get("template", "") is None:
            return f"what data.maker = '{self.data.maker}' makes"
        for source in self.data.sources if self.data is not None else ():
            if source.rollouts is not None:
                return f"what source '{source.name}' reads"
        named = self.named_objectives
        for stage in self.stages:
            for name in stage.objectives:
                one = named.get(name)
                if isinstance(one, SftConfig | RlConfig | DistillConfig) and one.template is None:
                    return f"what objective '{name}' reads"
        if self.evaluation.while_training:
            for suite in self.evaluation.suites:
                if suite.uses_template and suite.template is None:
                    return f"what suite '{suite.name}' asks"
        return ""

    def _samplers(self) -> str:
        """What of the training generates text, if anything."""
        named = self.named_objectives
        for stage in self.all_stages if self.stages else ():
            for name in stage.objectives:
                one = named.get(name)
                if isinstance(one, RlConfig) or (isinstance(one, DistillConfig) and one.samples):
                    return f"objective '{name}'"
        if self.evaluation.while_training:
            for suite in self.evaluation.suites:
                if suite.kind in SAMPLED:
                    return f"suite '{suite.name}'"
        return ""

    def _problems_of_stages(self) -> list[tuple[str, str]]:
        found = []
        steps = self.training.steps
        if self.stages and steps is not None:
            found.append(("training.steps", f"is {steps}, but [[stages]] have steps of their own"))
        if not self.stages and steps is None:
            return [("training.steps", "is missing; give it, or [[stages]]")]
        if double := TAKEN & set(self.objectives):
            found.append(
                ("objectives", f"uses the name {', '.join(sorted(double))}, which is taken")
            )
        known = {PRETRAINING, *self.named_objectives}
        for number, stage in enumerate(self.all_stages):
            where = f"stages.{number}.objectives" if self.stages else "optimizer"
            for name, objective in stage.objectives.items():
                place = f"{where}.{name}" if self.stages else where
                if name not in known:
                    found.append((place, f"is not known; allowed are {', '.join(sorted(known))}"))
                elif name != PRETRAINING and "lr" not in objective.model_fields_set:
                    # [optimizer] says it too; what a parent was pre-trained with does not.
                    found.append((f"{place}.lr", _no_lr(stage.label, name, objective)))
                if name == PRETRAINING and self.data is None and self.stages:
                    found.append((place, "needs [data]"))
                down = objective.warmup_steps + (objective.decay_steps or 0)
                length = objective.schedule_steps or stage.times.steps_of(name)
                if down > length:
                    allowed = "training.steps" if not self.stages else "the stage"
                    found.append(
                        (
                            f"{place}.warmup_steps",
                            f"+ decay_steps = {down}; {allowed} allows at most {length}",
                        )
                    )
        return found
