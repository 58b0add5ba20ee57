"""The claims in numbers, a line for each comparison: what docs/study.md has in its table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

from megarlx.report.claims import Finding
from megarlx.report.study import BASE, Study
from megarlx.study.gate import correlation_of, looked_up

HEAD = (
    *("", "verdict", "difference", "points", "95% over trunks", "over questions"),
    *("above/below", "by checkpoint", "with lookups"),
)


def rows_of_claims(study: Study, findings: Mapping[str, Finding]) -> Iterator[list[str]]:
    """Of claims that have data. The last column is the correlation of a trunk's difference with
    how well the trunk knows its lookups."""
    known = _known(study)
    for name, finding in findings.items():
        found = [c for c in finding.evidence.get("comparisons", ()) if c["trunks"]]
        for number, one in enumerate(found):
            first = ["", ""] if number else [name, finding.verdict]
            yield [*first, *_told(one), correlation_of(known, one["by_trunk"])]
        if found and "direction" in finding.evidence:
            direction = finding.evidence["direction"]
            yield ["", direction["verdict"], direction["claim"], *[""] * (len(HEAD) - 3)]


def _told(one: Mapping[str, Any]) -> list[str]:
    signs = one["signs"]
    return [
        one["difference"],
        f"{one['points']:+.1f}",
        _interval(one["interval"]),
        _interval(one["these_trunks"]["interval_over_questions"]),
        f"{signs['above']}/{signs['below']}",
        " ".join(f"{at['points']:+.1f}" for at in one["by_checkpoint"].values() if at),
    ]


def _interval(bounds: list[float | None] | None) -> str:
    if not bounds or None in bounds:
        return "–"
    return f"{bounds[0]:+.1f} to {bounds[1]:+.1f}"


def _known(study: Study) -> dict[str, float]:
    """Trunk -> mean over its checkpoints of the probability of the right value, in percent."""
    found: dict[str, list[float]] = {}
    for cell in study.of_recipe(BASE):
        if cell.trunk and (value := looked_up(cell)) is not None:
            found.setdefault(cell.trunk.name, []).append(value)
    return {name: fmean(values) for name, values in found.items()}
