"""Arguments that several commands take."""

from __future__ import annotations

import argparse


def add_overrides(
    parser: argparse.ArgumentParser, help: str = "override one key; may be given several times"
) -> None:
    """--set a.b=c, for `load_config`; `overrides` of what is parsed."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", dest="overrides", help=help
    )


def add_weights(parser: argparse.ArgumentParser) -> None:
    """--weights, for commands that read those of a checkpoint."""
    parser.add_argument(
        "--weights",
        choices=("last", "average"),
        default="last",
        help="of the checkpoint: those of its step, or their moving average, where "
        "checkpoints.average_decay keeps one (default: last)",
    )


def add_trust(parser: argparse.ArgumentParser) -> None:
    """--trust NAME, for `check_trust`; `trusted` of what is parsed."""
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="NAME",
        dest="trusted",
        help="let the run's configuration name this code of yours; may be given several times",
    )
