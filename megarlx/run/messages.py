"""What a run says to people: at first what it trains, then a line a log, at last what is next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Iterator, Mapping

import torch

from megarlx.config import Config, StageConfig
from megarlx.config.distill import DistillConfig
from megarlx.config.objectives import PRETRAINING, RL, OwnConfig, RlConfig
from megarlx.config.trust import names_in, untold
from megarlx.run.assemble import Run
from megarlx.run.made import path_of
from megarlx.units import duration

# Of policy optimisation, where they are known: the metric, what the line calls it, its form.
OF_POLICY = (
    ("reward", "reward", ".3f"),
    ("response_length", "length", ".0f"),
    ("entropy", "entropy", ".3f"),
    ("kl", "KL", "z.4f"),
    ("informative_groups", "informative", ".0%"),
)
COMBINED = {"single": "", "alternate": " in turn", "average": " averaged"}


def header(run: Run) -> Iterator[str]:
    """What is trained, on what, and where it can be watched."""
    config, folder = run.config, run.directory.path
    yield f"{folder}: {_model(config)}"
    yield f"on {_machine(run)}"
    stages = config.all_stages
    for number, stage in enumerate(stages, 1):
        which = f"stage {number} of {len(stages)}" if len(stages) > 1 else "trains"
        yield f"{which}: {_stage(stage)}"
    for name in dict.fromkeys(name for stage in stages for name in stage.objectives):
        yield f"{name}: {_batch(name, config)}"
    every = config.checkpoints.save_every_steps
    often = f"every {every:,} steps and at the end" if every else "at the end"
    board = shlex.join(["tensorboard", "--logdir", str(folder / "tensorboard")])
    yield f"saved {often} in {run.directory.checkpoints}; to watch: {board}"
    kept = config.checkpoints.keep_every_steps
    if config.checkpoints.keep_last and every and kept and kept % every:
        yield (
            f"warning: checkpoints.keep_every_steps = {kept:,} is no multiple of "
            f"save_every_steps = {every:,}: of the older checkpoints only those at multiples of "
            f"{math.lcm(kept, every):,} stay"
        )


def _model(config: Config) -> str:
    model = config.model
    return (
        f"{model.family}, {model.parameters():,} parameters, {model.layers} layers of "
        f"{model.hidden_size}, {model.vocab_size:,} tokens in the vocabulary"
    )


def _machine(run: Run) -> str:
    mesh, precision = run.mesh, run.config.training.precision
    device = "CPU"
    if run.device.type == "cuda":
        device = torch.cuda.get_device_name(run.device)
    if mesh.world.size == 1:
        return f"1 process, {device}, {precision}"
    axes = {"pipeline": mesh.pp, "replica": mesh.replica, "data": mesh.dp, "tensor": mesh.tp}
    sizes = ", ".join(f"{name} {axis.size}" for name, axis in axes.items() if axis.size > 1)
    return f"{mesh.world.size} processes ({sizes}), {device}, {precision}"


def _stage(stage: StageConfig) -> str:
    names = " and ".join(stage.objectives)
    named = f"{stage.name}, " if stage.name else ""
    return f"{named}{stage.steps:,} steps of {names}{COMBINED[stage.combine]}"


def _batch(name: str, config: Config) -> str:
    """What one step of an objective reads."""
    one, training = config.named_objectives.get(name), config.training
    if isinstance(one, OwnConfig):
        return one.function
    if isinstance(one, RlConfig):
        return (
            f"{one.prompts_per_step} prompts × {one.samples_per_prompt} samples a step, at most "
            f"{one.most_written_tokens:,} tokens each; {path_of(one.prompts, config)}"
        )
    if isinstance(one, DistillConfig):
        samples = one.prompts_per_rollout * one.samples_per_prompt
        return (
            f"{samples} sequences a step, others every {one.rollout_every_steps} steps; "
            f"{', '.join(one.teachers)}"
        )
    count, length, source = training.sequences_per_step, training.sequence_length, ""
    if one is not None:
        count, length = one.sequences_per_step or count, one.sequence_length or length
        source = path_of(one.conversations, config)
    elif name == PRETRAINING and config.data is not None:
        source = config.data.place or ", ".join(s.name for s in config.data.sources)
    return f"{count:,} sequences of {length:,} tokens a step" + (f"; {source}" if source else "")


def headline(
    config: Config, names: Iterable[str], values: Mapping[str, float], seconds_left: float
) -> str:
    """The objectives of a log line, the speed, and the time that is left at the pace so far."""
    several = len({name for stage in config.all_stages for name in stage.objectives}) > 1
    shown = []
    for name in names:
        label = f"{name} " if several else ""
        shown.append(f"{label}loss {values[f'loss/{name}']:z.4f}")
        shown += _of_policy(config, name, values)
    shown.append(f"{values['perf/tokens_per_second']:,.0f} tokens/s")
    shown.append(f"mfu {values['perf/mfu']:.2f}")
    if seconds_left > 0:
        shown.append(f"{duration(seconds_left)} left")
    return "  ".join(shown)


def _of_policy(config: Config, name: str, values: Mapping[str, float]) -> Iterator[str]:
    one = config.named_objectives.get(name)
    if not isinstance(one, RlConfig):
        return
    before = "rl/" if name == RL else f"rl/{name}/"
    for key, label, form in OF_POLICY:
        known = before + key in values and (key != "kl" or one.policy.kl != "none")
        if known:
            yield f"{label} {values[before + key]:{form}}"


def done(run: Run, seconds: float, trained: int) -> str:
    """The last line: what has been made, and what can be typed now. `trained`: steps since the
    start, which are none where the run was done before."""
    config, folder = run.config, str(run.directory.path)
    steps = f"done: {run.trainer.steps_done:,} steps in {duration(seconds)}"
    if not trained:
        steps += f" before this start, which had nothing to train ({_longer(config)})"
    asks = bool(config.evaluation.suites) or (config.data is not None and config.data.maker)
    evaluate = ["evaluate", folder, *([] if asks else ["--config", "SUITES.toml"])]
    named = untold(names_in(config, {"model", "data", "evaluation"}))
    trust = [word for name in named for word in ("--trust", name)]
    commands = (
        [*evaluate, *trust],
        ["branch", folder, "RECIPE.toml", "--out", "RUN2", *trust],
        ["report", str(run.directory.path.parent)],
    )
    typed = ", ".join(shlex.join(["megarlx", *words]) for words in commands)
    return f"{steps}; saved in {run.directory.checkpoints}; next: {typed}"


def _longer(config: Config) -> str:
    if not config.stages:
        return "longer: --set training.steps=…"
    return "stages keep their length; more of them: megarlx branch"
