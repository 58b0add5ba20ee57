"""`megarlx study WHAT DIR`: what decides how the study is run, read off finished runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megarlx.printable import complain

if TYPE_CHECKING:
    from megarlx.report.study import Study

FAILED = 3  # exit code when a line of the gate does not hold
OPEN = 75  # when something is still to be measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=["gate", "tuning", "hash", "claims", "kept", "kept-tuning", "kept-hash"],
        help="gate: does competence grow smoothly in the world? tuning: which settings of the "
        "recipes does the rule choose? hash: of the settings that claims are judged by. claims: "
        "each with its numbers. kept: the table of what early RL leaves; kept-tuning and kept-hash "
        "are of that study",
    )
    parser.add_argument(
        "directory", type=Path, nargs="?", metavar="DIR", help="holds runs, or their records"
    )
    parser.add_argument(
        "--figure", type=Path, metavar="FILE", help="of kept: also draw it, as .png or .svg"
    )
    parser.add_argument(
        "--difference",
        nargs=2,
        action="append",
        default=[],
        metavar=("A", "B"),
        help="of kept: also A − B of two of its rows, paired by trunk, in each world that has them",
    )
    parser.add_argument(
        "--records",
        type=Path,
        metavar="DIR",
        help="records of a sweep: they tell of runs that are not in the first folder",
    )


def run(arguments: argparse.Namespace) -> int:
    from megarlx.config import ConfigError
    from megarlx.report.runs import ReportError
    from megarlx.report.study import Study
    from megarlx.study.expected import kept_hash, settings_hash

    try:
        if arguments.what in ("hash", "kept-hash"):
            print(settings_hash() if arguments.what == "hash" else kept_hash())
            return 0
        if arguments.directory is None:
            complain(
                f"megarlx study {arguments.what}: needs DIR, which holds runs or their records"
            )
            return 2
        study = Study.of(arguments.directory, arguments.records)
    except (ConfigError, ReportError, OSError) as error:
        complain(f"megarlx study: {error}")
        return 1
    if arguments.what == "kept":
        return _kept(study, arguments.figure, arguments.difference)
    whats = {"gate": _gate, "tuning": _tuning, "claims": _claims, "kept-tuning": _kept_tuning}
    return whats[arguments.what](study)


def _gate(study: Study) -> int:
    from megarlx.study.gate import gate, known, passed

    lines = gate(study)
    words = {True: "held", False: "not held", None: "not known"}
    rows = [
        [f"{line.checkpoint_tokens:,}", line.demand, line.found, words[line.held]] for line in lines
    ]
    _print(["tokens", "demand", "found", ""], rows)
    for text in known(study):
        _say(text)
    _say(f"seeds {', '.join(map(str, study.seeds))}")
    for line in study.missing():
        _say(f"missing: {line}")
    verdict = None if study.missing() else passed(lines)
    if verdict is None:
        _say("The gate is open: something is not measured yet.")
        return OPEN
    _say("The gate is passed." if verdict else "The gate is not passed.")
    return 0 if verdict else FAILED


def _tuning(study: Study) -> int:
    from megarlx.report.study import KS
    from megarlx.study.tuning import MOST_RUNS, candidates, chosen, dials

    found = candidates(study)
    best = chosen(found)
    rows = []
    for one in found:
        shown = ["/".join(f"{v:.1f}" for v in one.by_seed(k)) for k in KS]
        rows.append([one.label, *shown, f"{one.mean:.2f}", "chosen" if one in best else ""])
    seeds = "/".join(map(str, study.seeds))
    _print(["settings", *(f"pass@{k} of {seeds}" for k in KS), "mean", ""], rows)
    rows = [
        [
            dial.value,
            ", ".join(dial.in_direction),
            f"{dial.weakest:+.1f}",
            "; ".join(
                f"{claim} {'/'.join(f'{v:+.1f}' for v in effects)}"
                for claim, effects in dial.effects.items()
            ),
            "" if number else "chosen",
        ]
        for number, dial in enumerate(dials(study, found))
    ]
    _print(["dial", "as in the paper", "weakest, in errors", f"effects of {seeds}", ""], rows)
    runs = len(study.excursions)
    _say(f"{runs} runs of at most {MOST_RUNS}")
    return 0 if found and runs <= MOST_RUNS else FAILED


def _claims(study: Study) -> int:
    from megarlx.report.claims import judge_all
    from megarlx.study.verdicts import HEAD, rows_of_claims

    rows = list(rows_of_claims(study, judge_all(study)))
    _print([*HEAD], rows)
    for line in study.missing():
        _say(f"missing: {line}")
    return 0 if rows else FAILED


def _kept(study: Study, figure: Path | None, pairs: list[tuple[str, str]]) -> int:
    from megarlx.study.kept.arms import worlds_of
    from megarlx.study.kept.chosen import PATH, frozen_rates
    from megarlx.study.kept.shown import differences, sections
    from megarlx.study.kept.table import Table

    tables = {
        world: Table(trunks, frozen_rates(world)) for world, trunks in worlds_of(study).items()
    }
    for one, other in pairs:
        labels = [[row.label for row in table.rows()] for table in tables.values()]
        if not any(one in own and other in own for own in labels):
            complain(
                f"megarlx study kept: --difference names {one!r} and {other!r}; no world has both "
                f"rows. A world has: {'; another: '.join(', '.join(own) for own in labels)}"
            )
            return 2
    for world, table in tables.items():
        _say(f"\n{world}")
        if table.late_steps and not table.rates:
            _say(f"{PATH} has no [{world}.rates]: no late run is shown")
        for title, head, rows in (*sections(table), *differences(table, pairs)):
            _say(f"\n{title}")
            _print(head, rows)
    if figure is not None and tables:
        from megarlx.study.kept.figure import draw

        draw(tables, figure)
        _say(str(figure))
    # Some runs of these sweeps are a step to others and have no evaluation of their own: how many
    # trunks an arm has is in its row.
    for line in study.wrong():
        _say(f"missing: {line}")
    return 0 if tables else FAILED


def _kept_tuning(study: Study) -> int:
    from megarlx.study.kept.arms import worlds_of
    from megarlx.study.kept.chosen import PATH, alphas, best, corpus_steps, rates
    from megarlx.study.kept.facts import checks
    from megarlx.study.kept.table import STARTS

    some = False
    for world, trunks in worlds_of(study).items():
        rates_ = rates(trunks, STARTS)
        found = {**alphas(trunks), **rates_}
        some = some or bool(found)
        rows = [
            [what, name, f"{value:.2f}", "chosen" if name == best(by) else ""]
            for what, by in found.items()
            for name, value in by.items()
        ]
        seeds = "/".join(str(arms.seed) for arms in trunks)
        _say(f"\n{world}")
        _print(["", "alpha or rate", f"pass@1, validation, mean of seeds {seeds}", ""], rows)
        rows = [
            [
                check.what,
                f"≥ {check.least:g}",
                "/".join(f"{value:.1f}" for value in check.found),
                "held" if check.held else "not held",
            ]
            for check in checks(trunks)
        ]
        if rows:
            _print(["check", "points", f"of seeds {seeds}", ""], rows)
        if (steps := corpus_steps(trunks)) is not None:
            _say(f"{steps} steps of pre-training cost what early RL does: of the control corpus")
        if chosen := {what: best(by) for what, by in found.items() if what in rates_}:
            _say(f"For {PATH}:\n\n[{world}.rates]")
            _say("\n".join(f'"{what}" = {rate}' for what, rate in chosen.items()))
    return 0 if some else FAILED


def _print(head: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in head:
        table.add_column(name)
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(table)


def _say(text: str) -> None:
    from megarlx.printable import printable

    print(printable(text))
