"""`megarlx train`: trains a run, alone or under torchrun, Slurm or MPI; resumes by itself."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megarlx.config import Config, ConfigError, load_config
from megarlx.config.arguments import add_overrides
from megarlx.config.command import add_config, help_config
from megarlx.printable import complain

if TYPE_CHECKING:
    import torch

    from megarlx.comm.launch import Launch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, "what to train")
    add_overrides(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="RUN",
        help="the run's folder (default: runs/ and the name of the configuration)",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="refuse a folder that already holds checkpoints"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.help_config is not None:
        return help_config(arguments.help_config)
    try:
        config = load_config(arguments.config, arguments.overrides)
    except ConfigError as error:
        complain(error)
        return 2
    source = Path(arguments.config)
    out = arguments.out or Path("runs") / source.stem
    return _train(config, source, out, arguments.fresh)


def _train(config: Config, source: Path, out: Path, fresh: bool) -> int:
    from megarlx.run.session import session

    def work(started: Launch, device: torch.device) -> int:
        from megarlx.run.begin import start
        from megarlx.run.stopped import exit_code

        stopped = start(config, source, out, started, device, fresh=fresh)
        return exit_code(started.launcher) if stopped else 0

    return session("train", config, work)
