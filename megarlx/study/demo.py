"""`megarlx demo`: a trunk, excursions and their report on this machine, in minutes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
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
    add_overrides(
        parser,
        'override one key of the sweep, of its trunk as set."training.steps"=500; may be given '
        "several times",
    )


def shipped_sweep(name: str, overrides: Sequence[str] = ()) -> SweepConfig:
    """A sweep of configs/, whatever folder this is called in: that of a clone, or what came with
    the installed package."""
    places = (Path("configs"), *(Path(__file__).parents[up] / "configs" for up in (0, 2)))
    folder = next((place for place in places if (place / f"{name}.toml").is_file()), None)
    if folder is None:
        raise ConfigError([f"configs/{name}.toml is in none of {', '.join(map(str, places))}"])
    config = load_config(folder / f"{name}.toml", overrides, SweepConfig)

    def placed(path: str) -> str:
        return str(folder / path.removeprefix("configs/")) if path.startswith("configs/") else path

    excursions = tuple(
        one.model_copy(update={"recipes": tuple(map(placed, one.recipes))})
        for one in config.excursions
    )
    return config.model_copy(update={"trunk": placed(config.trunk), "excursions": excursions})


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from megarlx.report.command import run as report
    from megarlx.sweeps.plan import jobs_of
    from megarlx.sweeps.run import LEFT, SweepRunner

    overrides = list(arguments.overrides)
    for key in ("out", "jobs", "seeds"):
        if getattr(arguments, key) is not None:
            overrides.append(f"{key}={getattr(arguments, key)!r}")
    try:
        config = shipped_sweep("study" if arguments.study else "demo", overrides)
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
    if code or shown:
        return code or shown
    trunk = next(job.out for job in jobs if job.out is not None)
    console.print(
        f"next: look at {config.out}/report/index.html; ask the model something: megarlx generate "
        f"{trunk} --prompt '…'; your own model: docs/own_model.md",
        markup=False,
        soft_wrap=True,
    )
    return 0
