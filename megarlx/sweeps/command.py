"""`megarlx sweep`: all runs of a study; what is finished is not run again."""

from __future__ import annotations

import argparse

from megarlx.config import ConfigError, load_config
from megarlx.config.arguments import add_overrides
from megarlx.config.sweep import SweepConfig
from megarlx.printable import complain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", metavar="SWEEP.toml", help="trunks, checkpoints, recipes, seeds")
    parser.add_argument("--jobs", type=int, help="runs at the same time, in place of the file's")
    add_overrides(parser, "override one key of the sweep; may be given several times")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    parser.add_argument(
        "--slurm", metavar="FILE", help="write a script that submits the runs, and run nothing"
    )


def run(arguments: argparse.Namespace) -> int:
    import shlex
    from pathlib import Path

    from rich.console import Console

    from megarlx.sweeps.plan import check_checkpoints, check_files, jobs_of
    from megarlx.sweeps.records import JobSettings
    from megarlx.sweeps.run import SweepRunner, slurm_script

    try:
        overrides = list(arguments.overrides)
        if arguments.jobs is not None:
            overrides.append(f"jobs={arguments.jobs}")
        config = load_config(arguments.sweep, overrides, SweepConfig)
        jobs = jobs_of(config)
        check_files(config)
        check_checkpoints(config)
        settings = JobSettings(jobs)
        settings.check()
    except ConfigError as error:
        complain(error)
        return 2
    if config.suites is not None and (recipes := settings.unmeasured()):
        complain(
            f"warning: what {', '.join(recipes)} makes is measured by nothing: the sweep's suites "
            "are for its trunk and for sums; [[evaluation.suites]] of a recipe are its own"
        )
    if arguments.list:
        for job in jobs:
            print("megarlx", shlex.join(job.arguments))
        return 0
    if arguments.slurm is not None:
        Path(arguments.slurm).write_text(slurm_script(config, jobs), encoding="utf-8")
        print(f"{len(jobs)} jobs; next: bash {shlex.quote(arguments.slurm)}")
        return 0
    return SweepRunner(config, jobs, console=Console()).run()
