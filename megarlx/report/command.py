"""`megarlx report DIR`: figures, one page and summary.json, from the files of the runs alone."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from megarlx import plug
from megarlx.data.token_files import write_atomically
from megarlx.printable import complain, printable
from megarlx.report.claims import TRUNKS_NEEDED, Finding
from megarlx.report.folded import has_data, is_of_the_paper
from megarlx.report.headline import said
from megarlx.report.result_table import results
from megarlx.report.runs import ReportError
from megarlx.report.study import Study

if TYPE_CHECKING:
    from megarlx.report.drawing import Figure

SHOWN_MISSING = 10
PAGE = "index.html"
FOLDER = "report"  # of a study, where no other is given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="holds runs, at any depth")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where the report goes (default: DIR/report)"
    )
    parser.add_argument(
        "--records",
        type=Path,
        metavar="DIR",
        help="records of a sweep: they tell of runs that are not in the first folder",
    )
    parser.add_argument(
        "--claim",
        action="append",
        default=[],
        metavar="NAME",
        dest="claims",
        help="judge this one, ours or module:name; may be given several times (default: P1 to P15)",
    )


def run(arguments: argparse.Namespace) -> int:
    out = arguments.out or arguments.directory / FOLDER
    try:
        study = Study.of(arguments.directory, arguments.records)
        runs = f"{len(study.runs)} run{'' if len(study.runs) == 1 else 's'}"
        print(f"{runs}: drawing the figures, the page and the viewer …", file=sys.stderr)
        findings = write_report(study, out, arguments.claims)
    except (ReportError, plug.PlugError, OSError) as error:
        complain(f"megarlx report: {error}")
        return 1
    _print(study, findings, out, asked=bool(arguments.claims))
    return 0


def report_on(
    folder: str | Path, out: str | Path | None = None, *, claims: Sequence[str] = ()
) -> Path:
    """Writes figures, one page and summary.json of the runs in a folder; returns the page.

    out      where they go; absent: FOLDER/report
    claims   judge these, ours or module:name; none: P1 to P15
    """
    made = Path(folder) / FOLDER if out is None else Path(out)
    write_report(Study.of(Path(folder)), made, claims)
    return made / PAGE


def write_report(study: Study, out: Path, claims: Sequence[str] = ()) -> dict[str, Finding]:
    """index.html, summary.json and figures/; returns the verdicts."""
    import matplotlib

    from megarlx.report.claims import judge_all
    from megarlx.report.drawing import save
    from megarlx.report.page import SAMPLES, page
    from megarlx.report.rollouts import write_viewer
    from megarlx.report.samples import examples
    from megarlx.report.style import PARAMETERS
    from megarlx.report.summary import summary

    out.mkdir(parents=True, exist_ok=True)
    findings = judge_all(study, claims)
    shown = examples(study)
    samples = write_viewer(study.runs, out / SAMPLES, study.problems)
    with matplotlib.rc_context(PARAMETERS):
        drawn = list(_figures(study))
        for _, several in drawn:
            for figure in several:
                if figure.draw is not None:
                    save(figure, out / "figures")
        made = page(study, findings, drawn, shown, samples=samples, claims_asked=bool(claims))
    made_summary = json.dumps(summary(study, findings), indent=2, allow_nan=False)
    write_atomically(out / "summary.json", made_summary + "\n")
    write_atomically(out / PAGE, made)
    return findings


def _figures(study: Study) -> Iterator[tuple[str, list[Figure]]]:
    """What every variant of the trunks has, behind its name; then what is there once. The sections
    of the page stand in this order."""
    from megarlx.report import (
        figures,
        figures_of_agents,
        figures_of_placement,
        figures_of_runs,
        figures_of_training,
    )

    for drawn in ((figures.pass_at_k, figures.gains), (figures.capability, figures.held_out)):
        if drawn[0] is figures.capability:
            found = [figures_of_agents.success(study), figures_of_training.dynamics(study)]
            found += [figures_of_training.training(study), figures_of_training.pretraining(study)]
            yield "", [figure for figure in found if figure is not None]
        for number, variant in enumerate(study.variants):
            suffix = f"-{number + 1}" if len(study.variants) > 1 else ""
            made = [draw(study, variant) for draw in drawn]
            yield variant, [replace(f, name=f"{f.name}{suffix}") for f in made if f is not None]
    at_last = (
        *(figures_of_placement.placement, figures_of_runs.single_questions),
        *(figures_of_runs.readiness, figures_of_runs.cost),
    )
    yield "", [figure for draw in at_last if (figure := draw(study)) is not None]


def _print(study: Study, findings: dict[str, Finding], out: Path, *, asked: bool) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    if sentence := said(study):
        console.print(printable(sentence), markup=False)
    console.print(results(study))
    if asked or is_of_the_paper(study, findings):
        _print_claims(study, findings, console)
    missing = study.missing()
    for line in missing[:SHOWN_MISSING]:
        console.print(f"missing: {printable(line)}", markup=False)
    if len(missing) > SHOWN_MISSING:
        console.print(f"missing: {len(missing) - SHOWN_MISSING} more; the page names all")
    console.print(str(out / PAGE), markup=False, soft_wrap=True)


def _print_claims(study: Study, findings: dict[str, Finding], console: Console) -> None:
    if len(study.trunks) < TRUNKS_NEEDED:
        console.print("One trunk: no verdict on the claims of the paper is made.")
        return
    table = Table(box=None, pad_edge=False)
    for name in ("", "claim", "verdict"):
        table.add_column(name)
    for name, finding in findings.items():
        if has_data(finding):
            table.add_row(name, finding.evidence.get("claim", ""), finding.verdict)
    console.print(table)
