"""The table of the kept study as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megarlx.report.measures import Ratio
from megarlx.report.student import TrunkInterval, interval_of_trunks
from megarlx.study.kept.facts import Transfer, contradicted, transfer
from megarlx.study.kept.table import MEASURES, Row, Table, matrix

Section = tuple[str, list[str], list[list[str]]]  # title, head, rows
NONE = "–"


def sections(table: Table) -> Iterator[Section]:
    """Those that there is anything for."""
    rows = [_row(row) for row in table.rows()]
    if len(rows) > 1:  # the trunk's end stands in the first
        yield f"Arms over {len(table.trunks)} trunks, in points", HEAD, rows
    steps = table.steps()
    if steps:
        head = ["", "steps to 90% behind the trunk", "all RL steps", "steps saved"]
        found = [
            [name, str(after), str(every), NONE if saved is None else str(saved)]
            for name, (after, every, saved) in steps.items()
        ]
        yield "Steps to 90% of late RL's gain, of the means over trunks", head, found
    retained, half = table.retention()
    if retained:
        head = ["steps of pre-training behind RL", "of its gain is left"]
        found = [[str(after), _ratio(ratio)] for after, ratio in retained.items()]
        yield f"Trained through; half-life {half or NONE} steps", head, found
    carry = table.carry()
    if carry.by_trunk:
        over = interval_of_trunks([*carry.by_trunk.values()])
        left = f"left out {len(carry.left_out)} of {len(table.trunks)} trunks"
        rows_ = [[_interval(over), str(over.trunks), left]]
        yield "Answer-specific carry, at an equal m", ["points", "trunks", ""], rows_
    if (dose := table.dose()) is not None:
        yield "Dose", ["FLOP of early RL / of pre-training"], [[f"{dose:.3f}"]]
    silent = "Facts that only early RL saw, in points; chance is 8.3"
    yield from _transfer(silent, transfer(table.trunks))
    wrong = "Facts that text tells wrongly, in points: RL says them rightly in the middle"
    yield from _transfer(wrong, contradicted(table.trunks))
    for arms in table.trunks:
        if found_ := matrix(arms):
            onto = sorted({there for _, there in found_})
            shares = {place: f"{share:.0%}" for place, share in found_.items()}
            rows_ = [
                [f"{step:,}", *(shares.get((step, there), NONE) for there in onto)]
                for step in sorted({step for step, _ in found_})
            ]
            title = f"Transfer matrix, trunk of seed {arms.seed}: share of the late gain there"
            yield title, ["vector's step", *(f"onto {o:,}" for o in onto)], rows_


def differences(table: Table, pairs: Sequence[tuple[str, str]]) -> Iterator[Section]:
    """A − B of those pairs of rows that the table has."""
    rows = {row.label: row for row in table.rows()}
    for one, other in pairs:
        if one in rows and other in rows:
            found = table.difference(rows[one], rows[other]).items()
            lines = [[MEASURES[name], str(over.trunks), _interval(over)] for name, over in found]
            yield f"{one} − {other}, paired by trunk", ["", "trunks", "points"], lines


HEAD = [
    *("", "trunks", "m", "a", "pass@1/@8/@32", "gain over trunks", "over questions"),
    *("form", "skill", "of late gain", "capability", "TFLOP early, late"),
]


def _row(row: Row) -> list[str]:
    ys = "/".join(_number(row.mean(name)) for name in ("y", "y8", "y32"))
    questions = row.over_questions
    these = NONE if questions is None else f"{questions.low:+.1f} to {questions.high:+.1f}"
    return [
        row.label,
        str(len(row.points)),
        _number(row.mean("m")),
        _number(row.mean("a")),
        ys,
        _interval(row.gain),
        these,
        NONE if row.form is None else f"{row.form.form:+.1f}",
        NONE if row.form is None else f"{row.form.skill:+.1f}",
        _ratio(row.share),
        _number(row.mean("capability")),
        f"{row.early_flop / 1e12:.2f}, {row.late_flop / 1e12:.2f}",
    ]


def _transfer(title: str, found: Transfer | None) -> Iterator[Section]:
    if found is None:
        return
    rows = [
        [
            name,
            str(over.trunks),
            _interval(over, sign=""),
            _interval(found.gains[name]) if name in found.gains else NONE,
            _ratio(found.shares.get(name)),
        ]
        for name, over in found.known.items()
    ]
    yield title, ["", "trunks", "P of the right value", "over the trunk's end", "transfer"], rows


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f}"


def _interval(over: TrunkInterval, sign: str = "+") -> str:
    if over.trunks < 2:
        return f"{over.estimate:{sign}.1f}"
    return f"{over.estimate:{sign}.1f} ({over.low:{sign}.1f} to {over.high:{sign}.1f})"


def _ratio(ratio: Ratio | None) -> str:
    return NONE if ratio is None else f"{ratio.estimate:.0%} ({ratio.low:.0%} to {ratio.high:.0%})"
