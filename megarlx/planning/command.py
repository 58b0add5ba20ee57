"""`megarlx plan`: memory, messages and time of a layout, without the GPUs it is for."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from megarlx.config import Config, ConfigError, load_config
from megarlx.config.arguments import add_overrides
from megarlx.printable import complain

if TYPE_CHECKING:
    from megarlx.planning.job import Job
from megarlx.planning.pieces import Rollouts

SLOTS = 64  # of rollouts where nothing is said
WIDTH = 100  # of what is written to a file or a pipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.toml", help="what is to be trained")
    parser.add_argument(
        "--gpus", type=int, required=True, metavar="N", help="GPUs of the whole job"
    )
    parser.add_argument(
        "--gpu", default="h100", metavar="KIND", help="h100 (default), h200, a100 or b200"
    )
    parser.add_argument(
        "--objectives",
        type=int,
        metavar="N",
        help="so many averaged objectives with the batch of [training], whatever the stages are",
    )
    parser.add_argument(
        "--trunk",
        metavar="CONFIG.toml",
        help="where CONFIG.toml is a recipe: the configuration, the run, or the Hugging Face "
        "model that it starts from",
    )
    parser.add_argument(
        "--stage", metavar="NAME", help="a stage by name or number (default: the fullest)"
    )
    add_overrides(parser)
    parser.add_argument(
        "--best", type=int, default=5, metavar="N", help="layouts that the search shows"
    )
    rollouts = parser.add_argument_group("rollouts")
    rollouts.add_argument(
        "--rollout-slots",
        type=int,
        metavar="N",
        help="sequences generated at once on each copy of the model; their cache then counts in "
        "the memory of a step (default: 64, beside it)",
    )
    rollouts.add_argument(
        "--prompt-tokens", type=int, metavar="N", help="default: 512, or a third of the longest"
    )
    rollouts.add_argument(
        "--completion-tokens", type=int, metavar="N", help="default: 1024, or what is left"
    )
    dry = parser.add_argument_group("dry run")
    dry.add_argument(
        "--dry-run",
        action="store_true",
        help="build one rank without data and count what it sends in a step",
    )
    dry.add_argument("--rank", type=int, default=0, metavar="R", help="which one (default: 0)")
    parser.add_argument("--json", action="store_true", help="print values and no tables")


def run(arguments: argparse.Namespace) -> int:
    from megarlx.comm import launch

    try:
        config = planned_config(arguments)
    except ConfigError as error:
        complain(error)
        return 2
    try:
        if launch.read().rank != 0:
            return 0  # under a launcher every process would say the same
        return _plan(config, arguments)
    # What the user can mend is told in one line; anything else keeps its traceback.
    except (ValueError, launch.LaunchError) as error:
        complain(f"megarlx plan: {error}")
        return 2


def planned_config(arguments: argparse.Namespace) -> Config:
    """The configuration, or the recipe over that of its trunk."""
    if arguments.trunk is None:
        return load_config(arguments.config, arguments.overrides)
    from megarlx.hf.sources import is_hugging_face
    from megarlx.hf.trunk import plain_config
    from megarlx.run.branch import recipe_config

    trunk = Path(arguments.trunk)
    if is_hugging_face(trunk):
        before, own = Config.model_validate(plain_config(trunk)), None
    elif trunk.is_dir():  # a run; of what may be another's code a plan needs nothing
        before, own = load_config(trunk / "resolved.json", trusted=()), set[str]()
    else:
        before, own = load_config(trunk), None
    return recipe_config(before, Path(arguments.config), arguments.overrides, str(trunk), own)


def _plan(config: Config, arguments: argparse.Namespace) -> int:
    from megarlx.comm.hardware import GPUS
    from megarlx.planning.dry_run import dry_run
    from megarlx.planning.job import Job
    from megarlx.planning.report import (
        compare,
        differing,
        dry_run_values,
        make_plan,
        plan_values,
        print_dry_run,
        print_plan,
        print_stages,
        print_whole,
    )
    from megarlx.planning.stages import chosen_stage, jobs_by_stage

    if arguments.gpu not in GPUS:
        raise ValueError(f"--gpu is '{arguments.gpu}'; allowed are {', '.join(GPUS)}")
    for name in ("gpus", "objectives", "best", "rollout_slots"):
        given = getattr(arguments, name)
        if given is not None and given < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {given}; it must be at least 1")
    if arguments.objectives is not None:
        job = Job.of(config, arguments.gpus, objectives=arguments.objectives)
        job.check(arguments.gpus)
        jobs = {}
    else:
        jobs = jobs_by_stage(config, arguments.gpus)
        job = chosen_stage(jobs, arguments.stage)
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    if arguments.dry_run:
        walked = dry_run(job, arguments.rank)
        if arguments.json:
            print(json.dumps(dry_run_values(walked, job), indent=1))
        else:
            print_dry_run(walked, job, console)
        if wrong := differing(compare(walked, job)):
            print(
                f"megarlx plan: the bytes counted differ from the formula's in {', '.join(wrong)}",
                file=sys.stderr,
            )
            return 1
        return 0
    rollouts = _rollouts(config, job, arguments)
    plan = make_plan(
        job,
        GPUS[arguments.gpu],
        rollouts,
        cache_counts=arguments.rollout_slots is not None and not _made(job),
        best=arguments.best,
    )
    if arguments.json:
        print(json.dumps(plan_values(plan), indent=1))
    else:
        if len(jobs) > 1:
            print_stages(jobs, plan.gpu, console)
        print_plan(plan, console)
        if jobs:
            print_whole(jobs, [s.steps for s in config.all_stages], plan.gpu, console)
    return 0


def _made(job: Job) -> list[Rollouts]:
    """What the stage's own objectives generate with."""
    return [one.rollouts for one in job.all_objectives if one.rollouts is not None]


def _rollouts(config: Config, job: Job, arguments: argparse.Namespace) -> Rollouts:
    """Those of the stage, or what generating on this layout would be; as the command line says."""
    from megarlx.planning.pieces import Rollouts

    made = _made(job)
    words = (arguments.rollout_slots, arguments.prompt_tokens, arguments.completion_tokens)
    if made and all(word is None for word in words):
        return made[0]
    longest = min(1536, config.model.max_sequence_length)
    prompt = arguments.prompt_tokens or longest // 3
    completion = arguments.completion_tokens or max(1, longest - prompt)
    if min(prompt, completion) < 1 or prompt + completion > config.model.max_sequence_length:
        raise ValueError(
            f"--prompt-tokens {prompt} and --completion-tokens {completion} must be at least 1 and "
            f"together at most model.max_sequence_length, {config.model.max_sequence_length}"
        )
    return Rollouts(arguments.rollout_slots or SLOTS, prompt, completion)
