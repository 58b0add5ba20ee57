"""Which claims a report shows: those that its runs say something of."""

from __future__ import annotations

from collections.abc import Mapping

from megarlx.report.claims import Finding
from megarlx.report.study import Study


def has_data(finding: Finding) -> bool:
    comparisons = finding.evidence.get("comparisons")
    return comparisons is None or any(c["cells"] for c in comparisons)


def is_of_the_paper(study: Study, findings: Mapping[str, Finding]) -> bool:
    """Whether recipes start from checkpoints of a pre-training, and a claim speaks of them."""
    return any(study.checkpoints) and any(map(has_data, findings.values()))
