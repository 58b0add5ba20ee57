"""`megarlx evaluate`: measures a checkpoint, alone or under torchrun, Slurm or MPI."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megarlx import plug
from megarlx.config import Config, ConfigError, load_config
from megarlx.config.arguments import add_overrides, add_trust
from megarlx.config.evaluation import (
    SAMPLED,
    EvaluationConfig,
    SuiteConfig,
    SuitesConfig,
)
from megarlx.config.objectives import WRITE_TEMPLATE, TemplateConfig
from megarlx.printable import complain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN[@ITER]", help="RUN, RUN@latest, RUN@1000, RUN@tokens:4B, or RUN@all"
    )
    parser.add_argument(
        "--config",
        metavar="FILE.toml",
        help="the suites, as [[suites]] tables, and a [template] if the run has none or another "
        "(default: the run's own [evaluation])",
    )
    parser.add_argument(
        "--suite", action="append", metavar="NAME", help="only this one; may be given several times"
    )
    parser.add_argument("--samples", type=int, help="samples of each question, in place of theirs")
    parser.add_argument("--temperature", type=float, help="of sampling, in place of theirs")
    add_overrides(parser, "override a key of the run's configuration, as layout.tensor=2")
    add_trust(parser)


def run(arguments: argparse.Namespace) -> int:
    from megarlx.checkpoint import CheckpointError
    from megarlx.comm import launch
    from megarlx.rollouts.environments.process import BrokenEnvironment
    from megarlx.rollouts.rewards.process import RewardError
    from megarlx.run.assemble import choose_device
    from megarlx.run.opened import open_config

    try:
        started = launch.read()
        references = list(_references(arguments.run))
        config = open_config(
            references[0].run,
            started.world_size,
            arguments.overrides,
            uses=() if arguments.config else ("evaluation",),
            trusted=arguments.trusted,
        )
        evaluation, template = chosen(config, arguments)
        device = choose_device(config.training.device)
        launch.start(started, device, config.layout.time_limit_seconds)
        try:
            _evaluate(references, config, evaluation, template, started, device)
        finally:
            launch.stop()
    except ConfigError as error:
        complain(error)
        return 2
    # What the user can mend is told in one line each; anything else keeps its traceback.
    except (
        *(ValueError, OSError, CheckpointError, RewardError),
        *(BrokenEnvironment, launch.LaunchError),
    ) as error:
        complain(f"megarlx evaluate: {error}")
        return 1
    return 0


def _references(text: str) -> Iterator[Any]:
    from megarlx.checkpoint import iterations
    from megarlx.run.directory import RunError
    from megarlx.run.reference import resolve

    if not text.endswith("@all"):
        yield resolve(text)
        return
    run = text.removesuffix("@all")
    there = iterations(Path(run) / "checkpoints")
    if not there:
        raise RunError(f"{text}: the run {run} holds no checkpoints")
    yield from (resolve(f"{run}@{iteration}") for iteration in there)


def chosen(
    config: Config, arguments: argparse.Namespace
) -> tuple[EvaluationConfig, TemplateConfig | None]:
    """The suites that were asked for, with what the command line says of them; and their
    template: that of the suites' file, else the run's."""
    evaluation, template = config.evaluation, config.template
    if arguments.config is not None:
        evaluation = file = load_config(arguments.config, (), SuitesConfig)
        template = file.template or template
    elif not evaluation.suites and config.data is not None and config.data.maker is not None:
        suites = plug.resolve("data maker", config.data.maker).evaluated
        evaluation = EvaluationConfig(suites=suites)
    names = [suite.name for suite in evaluation.suites]
    if not names:
        raise ConfigError(["no suites: the run's configuration has none; give --config FILE.toml"])
    wanted = arguments.suite or names
    if unknown := [name for name in wanted if name not in names]:
        raise ConfigError([f"--suite {unknown[0]}: there is none; allowed are {', '.join(names)}"])
    changes = {
        name: value
        for name in ("samples", "temperature")
        if (value := getattr(arguments, name)) is not None
    }
    suites = [_changed(suite, changes) for suite in evaluation.suites if suite.name in wanted]
    asking = [suite.name for suite in suites if suite.uses_template]
    if template is None and asking:
        raise ConfigError([_no_template(asking, arguments)])
    return evaluation.model_copy(update={"suites": tuple(suites)}), template


def _no_template(asking: list[str], arguments: argparse.Namespace) -> str:
    file = arguments.config or "a file of suites, for --config"
    return (
        f"{arguments.run} has no [template], in which suite '{asking[0]}' asks its questions; into "
        f"{file} {WRITE_TEMPLATE}, as what it is compared with is asked, or templated = false for "
        "questions as they stand"
    )


def _changed(suite: SuiteConfig, changes: dict[str, Any]) -> SuiteConfig:
    if not changes or suite.kind not in SAMPLED:
        return suite
    from pydantic import ValidationError

    try:
        return SuiteConfig.model_validate({**suite.model_dump(), **changes})
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise ConfigError([f"suite {suite.name}: {d['msg']}" for d in details]) from None


def _evaluate(
    references: list[Any],
    config: Config,
    evaluation: EvaluationConfig,
    template: TemplateConfig | None,
    started: Any,
    device: Any,
) -> None:
    from megarlx.comm.collectives import barrier
    from megarlx.evaluation.interface import Subject
    from megarlx.evaluation.suites import Parent, evaluate
    from megarlx.run.made import made_for, write_data
    from megarlx.run.opened import load_weights, open_run, read_lineage
    from megarlx.run.tokenizer import template_of

    opened = open_run(references[0], config, started, device)
    if any(suite.made is not None for suite in evaluation.suites):
        if started.local_rank == 0:
            write_data(config)
        barrier(opened.model.mesh.world)
    made = made_for(evaluation.suites, config)
    lineage = read_lineage(references[0].run).get("parent")
    parent = None if lineage is None else Parent(Path(lineage["run"]), lineage["iteration"])
    say = print if started.rank == 0 else None
    for reference in references:
        if reference is not references[0]:
            loaded = load_weights(opened.model, reference.checkpoint)
            opened = dataclasses.replace(opened, reference=reference, loaded=loaded)
        if say is not None:
            kind = "pre-trained only" if opened.is_base else "trained to answer"
            say(f"{reference.checkpoint} ({opened.trunk_tokens:,} tokens of pre-training, {kind})")
        subject = Subject(
            opened.model,
            opened.tokenizer,
            template_of(template),
            opened.is_base,
            reference.iteration,
            opened.trunk_tokens,
            opened.loaded.digest,
            made,
        )
        evaluate(subject, evaluation, run=reference.run, parent=parent, say=say)
