"""The report's table in the terminal: the highest values of each checkpoint are marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from megarlx.printable import printable
from megarlx.report.asked_apart import in_several_ways
from megarlx.report.runs import Evaluation
from megarlx.report.settings import quantity
from megarlx.report.study import BASE, KS, Cell, Study
from megarlx.report.style import name_of
from megarlx.units import duration

Number = tuple[float | None, float | None]  # in percent, and what guessing reaches
Row = tuple[str, int, str]  # variant of the trunk, tokens of the checkpoint, recipe


def results(study: Study) -> Table:
    """A row for each checkpoint and recipe: means over seeds in percent, guessing beside them;
    of agents the tasks solved. What was asked in several ways has no highest."""
    rows: dict[Row, list[Cell]] = {}
    for cell in study.cells:
        if cell.recipe != BASE or cell.checkpoint_tokens in study.checkpoints:
            rows.setdefault((cell.variant, cell.checkpoint_tokens, cell.label), []).append(cell)
    ks = [k for k in KS if any(_pass_at(k, cells)[0] is not None for cells in rows.values())]
    numbers = {row: _numbers(study, cells, ks) for row, cells in rows.items()}
    best = _best(numbers)
    for place, asked in _asked(rows).items():
        if asked and in_several_ways(asked):
            best[place][: len(ks)] = [None for _ in ks]
    table = Table(box=None, pad_edge=False)
    several = len(study.variants) > 1
    if several:
        table.add_column("trunk", overflow="fold")
    table.add_column("tokens")
    table.add_column("recipe")
    answers = [f"pass@{k}, % (guessing)" for k in ks]
    solved = [f"{_shown(suite)}, % (at random)" for suite in study.agent_suites]
    for name in (*answers, *solved, "capability, %", "time"):
        table.add_column(name, justify="right")
    for (variant, tokens, label), cells in rows.items():
        row = numbers[variant, tokens, label]
        seconds = _mean([c.cost.get("seconds") for c in cells])
        table.add_row(
            *([_shown(variant)] if several else []),
            quantity(tokens),
            _shown(name_of(label)),
            *map(_marked, row, best[variant, tokens]),
            "–" if seconds is None else duration(seconds),
        )
    if any(value is not None for values in best.values() for value in values):
        table.caption, table.caption_justify = "* the highest of its checkpoint", "left"
    return table


def _numbers(study: Study, cells: Sequence[Cell], ks: Sequence[int]) -> list[Number]:
    """A row's percents: pass@k, tasks solved, capability; each with what guessing reaches."""
    found = [_pass_at(k, cells) for k in ks]
    for suite in study.agent_suites:
        found.append(_percents([cell.evaluations.get(suite) for cell in cells], "success"))
    return [*found, (_percent([study.capability(c) for c in cells]), None)]


def _pass_at(k: int, cells: Sequence[Cell]) -> Number:
    return _percents([cell.headline for cell in cells], f"pass_at_{k}")


def _asked(rows: Mapping[Row, list[Cell]]) -> dict[tuple[str, int], list[Evaluation]]:
    """By checkpoint, the results that stand in the columns of pass@k."""
    found: dict[tuple[str, int], list[Evaluation]] = {}
    for (variant, tokens, _), cells in rows.items():
        results = [cell.headline for cell in cells if cell.headline]
        found.setdefault((variant, tokens), []).extend(results)
    return found


def _best(numbers: Mapping[Row, list[Number]]) -> dict[tuple[str, int], list]:
    """For each checkpoint and column the highest value, where several rows have one."""
    together: dict[tuple[str, int], list[list[Number]]] = {}
    for (variant, tokens, _), row in numbers.items():
        together.setdefault((variant, tokens), []).append(row)
    best = {}
    for place, rows in together.items():
        columns = [
            [value for value, _ in column if value is not None]
            for column in zip(*rows, strict=True)
        ]
        best[place] = [max(values) if len(values) > 1 else None for values in columns]
    return best


def _marked(number: Number, best: float | None) -> str:
    value, guessing = number
    if value is None:
        return "–"
    text = f"{'*' if value == best else ''}{value:.1f}"
    return text if guessing is None else f"{text} ({guessing:.1f})"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _percent(values: Sequence[float | None]) -> float | None:
    """As it is shown: what looks equal is equally good."""
    mean = _mean(values)
    return None if mean is None else round(100 * mean, 1)


def _percents(evaluations: Sequence[Evaluation | None], metric: str) -> Number:
    found = [evaluation for evaluation in evaluations if evaluation]
    return (
        _percent([_share(e, metric) for e in found]),
        _percent([e.guessing.get(metric) for e in found]),
    )


def _share(evaluation: Evaluation, metric: str) -> float | None:
    """Also of a k that was not asked for, where the samples have it: the page shows it too."""
    if metric in evaluation.metrics:
        return evaluation.metrics[metric]
    percents = evaluation.percent(metric)
    return sum(percents.values()) / len(percents) / 100 if percents else None


def _shown(text: str) -> str:
    return escape(printable(text))
