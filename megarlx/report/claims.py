"""Claims about a study: what each compares, and how it is judged.

A verdict comes from the paired interval over questions, pooled over checkpoints and seeds: "held"
where all of it lies in the range that the claim allows, "not held" where none of it does, else
"undetermined". From one seed nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megarlx import plug
from megarlx.report.comparison import Comparison, Verdict, all_of
from megarlx.report.study import Study

SEEDS_NEEDED = 2


@dataclass(frozen=True)
class Finding:
    """`evidence` may say the "claim" in words, a "reason", and "comparisons"."""

    verdict: Verdict
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """What is said of a study, and the comparisons that it is judged by."""

    claim: str
    comparisons: Callable[[Study], list[Comparison]]
    at_every_checkpoint: bool = False
    notes: Callable[[Study], dict[str, Any]] | None = None

    def __call__(self, study: Study) -> Finding:
        made = self.comparisons(study)
        evidence: dict[str, Any] = {"claim": self.claim}
        verdict = all_of([c.verdict() for c in made])
        against = [
            f"{c.what} at {tokens:,} tokens"
            for c in made
            for tokens in c.checkpoints
            if self.at_every_checkpoint and c.verdict(tokens) == "not held"
        ]
        open_at = [
            f"{tokens:,} tokens"
            for c in made
            for tokens in c.checkpoints
            if self.at_every_checkpoint and c.verdict(tokens) == "undetermined"
        ]
        if against:
            verdict = "not held"
            evidence["against"] = against
        elif open_at and verdict == "held":
            verdict = "undetermined"
            evidence["reason"] = f"by itself the interval covers a boundary at {', '.join(open_at)}"
        without = [c.what for c in made if not c.cells]
        seeds = sorted({seed for c in made for seed in c.seeds})
        if without or not made:
            some = len(without) < len(made)
            evidence["reason"] = f"no data for {'; '.join(without)}" if some else "no data"
        elif len(seeds) < SEEDS_NEEDED:
            verdict = "undetermined"
            evidence["reason"] = f"one seed ({seeds[0]}): no verdict is claimed"
        elif verdict == "undetermined" and "reason" not in evidence:
            evidence["reason"] = "the interval covers a boundary of the claim"
        evidence["comparisons"] = [c.evidence() for c in made]
        if self.notes is not None:
            evidence |= self.notes(study)
        return Finding(verdict, evidence)


def judge_all(study: Study, names: Sequence[str] = ()) -> dict[str, Finding]:
    """Of the claims of these names, or of all that come with megarlx."""
    judges: dict[str, Callable[[Study], Finding]] = {
        name: plug.resolve("claim", name) for name in names or plug.ours("claim")
    }
    return {name: judge(study) for name, judge in judges.items()}
