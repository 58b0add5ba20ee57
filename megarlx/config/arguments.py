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
