"""summary.json: the verdicts, a row for each cell, and the hash of the settings."""

from __future__ import annotations

import math
from typing import Any

from megarlx.report.claims import Finding
from megarlx.report.study import KS, Cell, Study


def summary(study: Study, findings: dict[str, Finding]) -> dict[str, Any]:
    return {
        "predicates": {
            name: {
                "verdict": finding.verdict,
                "held": finding.verdict == "held",
                "evidence": finding.evidence,
            }
            for name, finding in findings.items()
        },
        "results": [_row(study, cell) for cell in study.cells],
        "settings_hash": study.settings_hash,
    }


def _row(study: Study, cell: Cell) -> dict[str, Any]:
    """Shares, not percent; null is what was not measured."""
    metrics = cell.headline.metrics if cell.headline else {}
    row: dict[str, Any] = {
        "checkpoint_tokens": cell.checkpoint_tokens,
        "recipe": cell.label,
        "seed": cell.seed,
        **{f"pass_at_{k}": _known(metrics.get(f"pass_at_{k}")) for k in KS},
        "capability": _known(study.capability(cell)),
        "seconds": _known(cell.cost.get("seconds")),
    }
    if study.agent_suites:
        found = {suite: cell.evaluations.get(suite) for suite in study.agent_suites}
        row["success"] = {s: _known(e.metrics.get("success")) for s, e in found.items() if e}
    # Only where trunks differ in more than their seeds are rows told apart by it.
    return row | {"trunk": cell.variant} if len(study.variants) > 1 else row


def _known(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
