"""`megarlx config`: checks a configuration and prints it in full."""

from __future__ import annotations

import argparse
import json
import sys

from megarlx.config.arguments import add_overrides
from megarlx.config.describe import describe
from megarlx.config.load import ConfigError, load_config
from megarlx.config.sections import Config
from megarlx.printable import complain
from megarlx.redact import redacted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, "the file to check")
    add_overrides(parser)


def add_config(parser: argparse.ArgumentParser, what_for: str) -> None:
    """The file, or --help-config in its place."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("config", nargs="?", metavar="CONFIG.toml", help=what_for)
    what.add_argument(
        "--help-config",
        nargs="?",
        const="",
        metavar="WORD",
        help="print every key and its meaning; with a word those of a section, as rl, or that say "
        "it",
    )


def help_config(word: str) -> int:
    found = describe(Config, word)
    if not found:
        complain(f"--help-config {word}: no key is called so, and none says it")
        return 1
    sys.stdout.write(found)
    return 0


def run(arguments: argparse.Namespace) -> int:
    if arguments.help_config is not None:
        return help_config(arguments.help_config)
    try:
        config = load_config(arguments.config, arguments.overrides)
    except ConfigError as error:
        complain(error)
        return 2
    sys.stdout.write(
        json.dumps(redacted(config.model_dump(mode="json")), indent=2, ensure_ascii=False) + "\n"
    )
    return 0
