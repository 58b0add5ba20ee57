"""`megarlx study gate DIR`: what decides how the study is run, read off finished runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megarlx.printable import complain

if TYPE_CHECKING:
    from megarlx.report.study import Study

FAILED = 3  # exit code when a gate's line does not hold
OPEN = 75  # when something is still to be measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["gate"], help="gate: is the world smooth enough?")
    parser.add_argument("directory", type=Path, metavar="DIR", help="holds runs, or their records")
    parser.add_argument(
        "--records",
        type=Path,
        metavar="DIR",
        help="records of a sweep: they tell of runs that are not in the first folder",
    )


def run(arguments: argparse.Namespace) -> int:
    from megarlx.report.runs import ReportError
    from megarlx.report.study import Study

    try:
        study = Study.of(arguments.directory, arguments.records)
    except (ReportError, OSError) as error:
        complain(f"megarlx study: {error}")
        return 1
    return _gate(study)


def _gate(study: Study) -> int:
    from rich.console import Console
    from rich.table import Table

    from megarlx.study.gate import gate, passed

    lines = gate(study)
    table = Table(box=None, pad_edge=False)
    for name in ("tokens", "demand", "found", ""):
        table.add_column(name)
    for line in lines:
        held = {True: "held", False: "not held", None: "not known"}[line.held]
        table.add_row(f"{line.checkpoint_tokens:,}", line.demand, line.found, held)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(table)
    verdict = passed(lines)
    said = {True: "The gate is passed.", False: "The gate is not passed."}
    console.print(said.get(verdict, "The gate is open: something is not measured yet."))
    return {True: 0, False: FAILED}.get(verdict, OPEN)
