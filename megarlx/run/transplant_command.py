"""`megarlx transplant`: what excursions made of their start, added to another checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megarlx.config import ConfigError
from megarlx.config.arguments import add_overrides, add_trust
from megarlx.printable import complain

NOT_REACHED = 3  # exit code where --match finds no alpha


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "excursions",
        metavar="EXCURSION[@N]",
        nargs="+",
        help="runs whose difference from their start is added, in this order",
    )
    parser.add_argument(
        "--onto", required=True, metavar="RUN@M", help="the checkpoint that they are added to"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="RUN2", help="the folder of the new run"
    )
    parser.add_argument(
        "--alpha",
        action="append",
        default=[],
        metavar="A",
        help="times each difference: one for all, or one each with commas (default: 1)",
    )
    parser.add_argument(
        "--from",
        action="append",
        default=[],
        metavar="RUN@K",
        dest="starts",
        help="what the difference is from, once for all or once each (default: the parent of the "
        "excursion's lineage.json)",
    )
    parser.add_argument(
        "--alphas", metavar="A,B,…", help="of these, one for all: the one with the highest pass@1"
    )
    parser.add_argument(
        "--match",
        metavar="RUN3",
        help="the alpha between 0 and 2 with this run's share of marked answers, within 2 points",
    )
    parser.add_argument(
        "--suite",
        metavar="NAME",
        help="that --alphas or --match measure (default: the one pass_at_k suite with split = "
        "'validation')",
    )
    parser.add_argument(
        "--config",
        metavar="FILE.toml",
        help="the suites, as evaluate takes them (default: the run's own [evaluation])",
    )
    parser.add_argument(
        "--change",
        metavar="permuted:SEED|random:SEED",
        help="a control: the difference with its layers permuted, or random numbers of its norm",
    )
    add_layout(parser)
    add_overrides(parser, "of RUN@M's configuration while it is measured, as layout.tensor=2")
    add_trust(parser)


def add_layout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layout", metavar="tp,pp,dp", help="write the files that a run in this layout would"
    )


def numbers(option: str, texts: Sequence[str]) -> list[float]:
    """Given with commas, or several times."""
    found = []
    for text in (one for given in texts for one in given.split(",")):
        try:
            found.append(float(text))
        except ValueError:
            raise ValueError(f"{option} is {text!r}; allowed are numbers with commas") from None
    return found


def run(arguments: argparse.Namespace) -> int:
    from megarlx.checkpoint import CheckpointError
    from megarlx.comm.launch import LaunchError
    from megarlx.rollouts.rewards.process import RewardError
    from megarlx.run.transplant import Asked, NotReachedError, make

    given = arguments
    try:
        asked = Asked(
            given.excursions,
            given.onto,
            given.out,
            numbers("--alpha", given.alpha),
            given.starts,
            numbers("--alphas", [] if given.alphas is None else [given.alphas]),
            given.match,
            given.suite,
            given.config,
            given.change,
            given.layout,
            given.overrides,
            given.trusted,
        )
        written = make(asked, print)
    except ConfigError as error:
        complain(error)
        return 2
    except (ValueError, OSError, CheckpointError, RewardError, LaunchError) as error:
        complain(f"megarlx transplant: {error}")
        return NOT_REACHED if isinstance(error, NotReachedError) else 1
    print(asked.out if written else f"{asked.out}: there already")
    return 0
