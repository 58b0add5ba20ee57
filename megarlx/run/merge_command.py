"""`megarlx merge`: a weighted mean of the weights of checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path

from megarlx.config import ConfigError
from megarlx.config.arguments import add_trust
from megarlx.printable import complain
from megarlx.run.transplant_command import add_layout, numbers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", metavar="RUN@N", nargs="+", help="two checkpoints or more, added in this order"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="RUN2", help="the folder of the new run"
    )
    parser.add_argument(
        "--shares", metavar="A,B,…", help="of each checkpoint; their sum is 1 (default: equal)"
    )
    add_layout(parser)
    add_trust(parser)


def run(arguments: argparse.Namespace) -> int:
    from megarlx.checkpoint import CheckpointError
    from megarlx.comm.launch import LaunchError
    from megarlx.run.merge import merged
    from megarlx.run.sums import write_sum

    given = arguments
    try:
        made = merged(
            given.runs, numbers("--shares", [] if given.shares is None else [given.shares])
        )
        made.check(given.trusted)
        written = write_sum(made, given.out, given.layout)
    except ConfigError as error:
        complain(error)
        return 2
    except (ValueError, OSError, CheckpointError, LaunchError) as error:
        complain(f"megarlx merge: {error}")
        return 1
    print(given.out if written else f"{given.out}: there already")
    return 0
