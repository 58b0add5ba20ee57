"""`megarlx view DIR`: the samples of a run, or of all runs below a folder, as a page."""

from __future__ import annotations

import argparse
from pathlib import Path

from megarlx.printable import complain, printable
from megarlx.report.rollouts import write_viewer
from megarlx.report.runs import ReportError, find_runs

FOLDER = "view"  # of a run or a folder of runs, where no other is given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory", type=Path, metavar="DIR", help="a run, or a folder that holds runs"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where the page goes (default: DIR/view)"
    )


def run(arguments: argparse.Namespace) -> int:
    out = arguments.out or arguments.directory / FOLDER
    try:
        runs, problems = find_runs(arguments.directory)
        if not runs:
            raise ReportError(f"{arguments.directory} holds no run: no lineage.json below it")
        count = write_viewer(runs, out, problems)
    except (ReportError, OSError) as error:
        complain(f"megarlx view: {error}")
        return 1
    for problem in problems:
        complain(problem)
    print(f"{count:,} samples: {printable(str(out / 'index.html'))}")
    return 0
