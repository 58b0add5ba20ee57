"""From a configuration to the objects of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megarlx import plug
from megarlx.checkpoint import Retention, Saver
from megarlx.choices import Choice
from megarlx.comm import launch
from megarlx.comm.collectives import barrier, gather_values
from megarlx.comm.groups import Layout, Mesh
from megarlx.config import Config, StageConfig
from megarlx.config.objectives import PRETRAINING
from megarlx.data.tokenizer import Tokenizer
from megarlx.evaluation.questions import check_suites
from megarlx.model.build import build_model
from megarlx.model.check_layout import check_layout
from megarlx.model.machine import this_machine
from megarlx.objectives.supervised import Supervised
from megarlx.run.choose import choose
from megarlx.run.directory import RunDirectory, RunError
from megarlx.run.made import made_for, write_data
from megarlx.run.make_objectives import ObjectiveMaker
from megarlx.run.protection import protected
from megarlx.run.tokenizer import load_tokenizer_of
from megarlx.training.learning_rate import learning_rate
from megarlx.training.outer import Outer
from megarlx.training.parts import UpdateSettings
from megarlx.training.shares import Adaptation, Course, Shares
from megarlx.training.trainer import TrainedObjective, Trainer, TrainingStage

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Run:
    """Everything a training loop works with, on this rank."""

    config: Config  # without `auto`
    choices: Mapping[str, Choice]  # what stands for it, by dotted key
    directory: RunDirectory
    mesh: Mesh
    trainer: Trainer
    tokenizer: Tokenizer | None
    validation: dict[str, Supervised]
    saver: Saver
    device: torch.device

    def write_description(self, source: Path) -> None:
        chosen = {key: str(choice) for key, choice in self.choices.items()}
        self.directory.write_description(self.config, source, self.tokenizer, chosen)

    def close(self) -> None:
        for objective in (*self.trainer.objectives.values(), *self.validation.values()):
            objective.close()


def choose_device(wanted: str) -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RunError("training.device is 'cuda', but torch sees no GPU; see `megarlx doctor`")
    return torch.device(wanted)


def choose_layout(config: Config, world_size: int) -> Layout:
    """The configured layout; data parallelism takes the processes that are left."""
    given = config.layout
    if given.replica > 1 and not any(s.placement == "replicas" for s in config.all_stages):
        raise RunError(
            f"layout.replica is {given.replica}; replicas run one objective each, and no stage has "
            "placement = 'replicas': allowed is 1"
        )
    others = given.pipeline * given.replica * given.tensor
    data = given.data if given.data is not None else max(1, world_size // others)
    layout = Layout(pp=given.pipeline, replica=given.replica, dp=data, tp=given.tensor)
    check_layout(
        config.model,
        layout,
        world_size=world_size,
        sequence_length=config.training.sequence_length,
        sequence_parallel=given.sequence_parallel,
        stages_per_rank=given.virtual_stages,
        layers_per_stage=given.layers_per_stage,
    )
    return layout


def check_placement(config: Config) -> None:
    """Replicas are objectives: of another number of them nothing can be made."""
    for stage in config.all_stages:
        count = len(stage.objectives)
        if stage.placement == "replicas" and config.layout.replica != count:
            raise RunError(
                f"layout.replica is {config.layout.replica}; stage '{stage.label}' has placement = "
                f"'replicas' for {count} objectives: allowed is {count}, one each"
            )


def assemble(
    config: Config,
    out: Path,
    started: launch.Launch,
    device: torch.device,
    *,
    tokenizer_from: Path | None = None,
) -> Run:
    """Needs `launch.start` to have been called; bad input is found here, before any step.

    An excursion reads text with the tokenizer of the run that it comes from.
    """
    check_placement(config)
    directory = RunDirectory(out)
    chosen = choose(config, this_machine(device), directory.begun_with())
    config = chosen.config
    training = config.training
    use_tf32(config, device)
    layout = choose_layout(config, started.world_size)
    mesh = Mesh.build(
        layout.pp,
        layout.replica,
        layout.dp,
        layout.tp,
        timeout_seconds=config.layout.time_limit_seconds,
        device=device,
    )
    _check_alike(chosen.choices, mesh)
    if config.data is not None:
        # Every node writes its own copy, and nobody reads before all have written.
        if started.local_rank == 0:
            write_data(config)
        barrier(mesh.world)
    check_suites(config.evaluation, made_for(config.evaluation.suites, config))
    kept = directory if tokenizer_from is None else RunDirectory(tokenizer_from)
    tokenizer = load_tokenizer_of(config, kept)
    model = build_model(
        config.model,
        mesh,
        seed=training.seed,
        schedule=config.layout.schedule,
        virtual_stages=config.layout.virtual_stages,
        layers_per_stage=config.layout.layers_per_stage,
        sequence_parallel=config.layout.sequence_parallel,
        recompute=training.recompute,
        backend=training.layers,
        attention=training.attention,
        fp8=None if training.fp8 == "none" else training.fp8,
        kept_gradients_mib=training.kept_gradients_mib,
        dtype=DTYPES[training.precision],
        device=device,
    )
    objectives = ObjectiveMaker(config, model, tokenizer, device, directory.samples)
    keep = config.checkpoints
    retention = Retention(
        last=keep.keep_last,
        every=keep.keep_every_steps,
        listed=frozenset(steps_at_tokens(config)),
    )
    run = Run(
        config,
        chosen.choices,
        directory,
        mesh,
        Trainer(
            model,
            [training_stage(stage, objectives) for stage in config.all_stages],
            keep.average_decay,
            capture_below_parameters=training.capture_below_parameters,
        ),
        tokenizer,
        objectives.validation(),
        Saver(directory.checkpoints, mesh.world, retention),
        device,
    )
    objectives.start_rewards()
    return run


def use_tf32(config: Config, device: torch.device) -> None:
    """torch has one switch for a process."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = config.training.tf32


def _check_alike(choices: Mapping[str, Choice], mesh: Mesh) -> None:
    mine = {key: choice.value for key, choice in choices.items()}
    for rank, theirs in enumerate(gather_values(mine, mesh.world)):
        for key, value in theirs.items():
            if mine.get(key) != value:
                raise RunError(
                    f"{key} became {mine.get(key)} on rank {mesh.rank} and {value} on rank {rank}, "
                    "whose machines differ; give it in the configuration"
                )


def training_stage(config: StageConfig, objectives: ObjectiveMaker) -> TrainingStage:
    members = []
    for name, one in config.objectives.items():
        mask = None
        if one.protect is not None:
            place = f"stage '{config.label}': objectives.{name}.protect"
            mask = protected(one.protect, objectives.model, place)
        rate = learning_rate(one, one.schedule_steps or config.times.steps_of(name))
        members.append(
            TrainedObjective(
                objectives[name],
                UpdateSettings.of(one),
                rate,
                turns=one.turns,
                inherit=one.inherit,
                protected=mask,
            )
        )
    courses = {
        name: Course(w.first, w.first if w.last is None else w.last)
        for name, one in config.objectives.items()
        for w in [one.weight]
    }
    adaptation = None
    if (adaptive := config.adaptive) is not None:
        adaptation = Adaptation(adaptive.rate, adaptive.sharpness, adaptive.least)
    outer = None
    if config.outer is not None:
        outer = Outer(config.outer.momentum, config.outer.rate)
    return TrainingStage(
        members,
        steps=config.steps,
        combine=config.combine,
        shared_moments=config.of == "gradients",
        combination=plug.resolve("combination", config.combination),
        shares=Shares(courses, config.steps, adaptation),
        placement=config.placement,
        sync_every=config.sync_every,
        generate_together=config.generate_together,
        outer=outer,
    )


def steps_at_tokens(config: Config) -> list[int]:
    """The first step at or past each listed count of pre-training tokens that can be saved."""
    per_step = config.training.sequences_per_step * config.training.sequence_length
    wanted = config.checkpoints.save_at_tokens
    return config.timeline.done_at_tokens(PRETRAINING, per_step, wanted)
