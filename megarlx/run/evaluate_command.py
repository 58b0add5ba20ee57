"""`megarlx evaluate`: measures a checkpoint, alone or under torchrun, Slurm or MPI."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megarlx.config import ConfigError
from megarlx.config.arguments import add_overrides, add_trust, add_weights
from megarlx.config.evaluation import EvaluationConfig
from megarlx.printable import complain

if TYPE_CHECKING:
    from megarlx.run.opened import OpenedRun
    from megarlx.run.suites import Templates


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
    add_weights(parser)


def run(arguments: argparse.Namespace) -> int:
    from megarlx.checkpoint import CheckpointError
    from megarlx.comm import launch
    from megarlx.rollouts.environments.process import BrokenEnvironment
    from megarlx.rollouts.rewards.process import RewardError
    from megarlx.run.assemble import choose_device
    from megarlx.run.opened import open_run
    from megarlx.run.opening import open_config
    from megarlx.run.suites import chosen

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
        evaluation, templates = chosen(
            config,
            arguments.run,
            file=arguments.config,
            names=arguments.suite or (),
            samples=arguments.samples,
            temperature=arguments.temperature,
        )
        device = choose_device(config.training.device)
        launch.start(started, device, config.layout.time_limit_seconds)
        try:
            opened = open_run(references[0], config, started, device, weights=arguments.weights)
            _evaluate(references, opened, evaluation, templates, started)
        finally:
            launch.stop()
    except ConfigError as error:
        complain(error)
        return 2
    except BrokenPipeError:  # who read the output has gone
        raise
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
    from megarlx.run.reference import resolve

    if not text.endswith("@all"):
        yield resolve(text)
        return
    run = resolve(text.removesuffix("@all")).run
    there = iterations(run / "checkpoints")
    yield from (resolve(f"{run}@{iteration}") for iteration in there)


def _evaluate(
    references: list[Any],
    opened: OpenedRun,
    evaluation: EvaluationConfig,
    templates: Templates,
    started: Any,
) -> None:
    from megarlx.run.opening import load_weights
    from megarlx.run.suites import made_suites, measured

    made = made_suites(opened, evaluation)
    say = print if started.rank == 0 else None
    for reference in references:
        if reference is not references[0]:
            loaded = load_weights(opened.model, reference.checkpoint, opened.weights)
            opened = dataclasses.replace(opened, reference=reference, loaded=loaded)
        if say is not None:
            kind = "pre-trained only" if opened.is_base else "trained to answer"
            say(f"{reference.checkpoint} ({opened.trunk_tokens:,} tokens of pre-training, {kind})")
        measured(opened, evaluation, templates, made, keep=True, say=say)
