"""`megarlx demo`: a trunk, excursions and their report on this machine, in minutes."""

from __future__ import annotations

import argparse
from pathlib import Path

from megarlx.config import ConfigError, load_config
from megarlx.config.arguments import add_overrides
from megarlx.config.sweep import SweepConfig
from megarlx.printable import complain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--study",
        action="store_true",
        help="the whole study in miniature: more checkpoints, all recipes, several seeds",
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="in place of the file's")
    parser.add_argument("--out", help="folder of the runs and the report")
    parser.add_argument("--jobs", type=int, help="runs at the same time")
    add_overrides(parser, "override one key of the sweep; may be given several times")


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from megarlx.report.command import run as report
    from megarlx.sweeps.plan import jobs_of
    from megarlx.sweeps.run import LEFT, SweepRunner

    overrides = list(arguments.overrides)
    for key in ("out", "jobs", "seeds"):
        if getattr(arguments, key) is not None:
            overrides.append(f"{key}={getattr(arguments, key)!r}")
    path = Path("configs/study.toml" if arguments.study else "configs/demo.toml")
    if not path.exists():
        complain(f"megarlx demo: {path} is not here; run it in megarlx's own folder")
        return 1
    try:
        config = load_config(path, overrides, SweepConfig)
        jobs = jobs_of(config)
    except ConfigError as error:
        complain(error)
        return 2
    console = Console()
    console.print(f"{len(jobs)} runs in {config.out}; stop whenever you like, they are resumed")
    code = SweepRunner(config, jobs, console=console).run()
    if code not in (0, LEFT):
        return code
    records = None if config.records is None else Path(config.records)
    shown = report(
        argparse.Namespace(directory=Path(config.out), records=records, out=None, claims=[])
    )
    return code or shown
