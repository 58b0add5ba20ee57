"""Claims about a study: what each compares, and how it is judged.

The trunk is the unit: of each trunk the mean of the paired differences over questions and
checkpoints. A verdict comes from the two-sided 95% t-interval over trunks: "held" where all of it
lies in the range that the claim allows, "not held" where none of it does, else "undetermined". From
one trunk nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megarlx import plug
from megarlx.report.comparison import Comparison, Verdict, all_of
from megarlx.report.study import Study

TRUNKS_NEEDED = 2


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
    at_every_checkpoint: bool = False  # judged at each, where others are judged over all
    notes: Callable[[Study], dict[str, Any]] | None = None

    def __call__(self, study: Study) -> Finding:
        made = self.comparisons(study)
        evidence: dict[str, Any] = {"claim": self.claim}
        places = [
            (c, at) for c in made for at in (c.checkpoints if self.at_every_checkpoint else [None])
        ]
        verdict = all_of([c.verdict(at) for c, at in places])
        if reason := self._reason(verdict, made, places):
            evidence["reason"] = reason
        against = [f"{c.what}{_told(at)}" for c, at in places if c.verdict(at) == "not held"]
        if against and self.at_every_checkpoint:
            evidence["against"] = against
        if _too_few(made):
            verdict = "undetermined"
        evidence["comparisons"] = [c.evidence() for c in made]
        if self.notes is not None:
            evidence |= self.notes(study)
        return Finding(verdict, evidence)

    def _reason(
        self, verdict: Verdict, made: list[Comparison], places: list[tuple[Comparison, int | None]]
    ) -> str:
        without = [c.what for c in made if not c.cells]
        if without or not made:
            some = len(without) < len(made)
            return f"no data for {'; '.join(without)}" if some else "no data"
        if _too_few(made):
            return f"one trunk ({next(iter(made[0].by_trunk))}): no verdict is claimed"
        if verdict != "undetermined":
            return ""
        at = [_told(at) for c, at in places if at and c.verdict(at) == "undetermined"]
        return f"the interval covers a boundary of the claim{','.join(at)}"


def _told(checkpoint_tokens: int | None) -> str:
    return "" if checkpoint_tokens is None else f" at {checkpoint_tokens:,} tokens"


def _too_few(made: list[Comparison]) -> bool:
    trunks = {trunk for c in made for trunk in c.by_trunk}
    return bool(trunks) and len(trunks) < TRUNKS_NEEDED


def judge_all(study: Study, names: Sequence[str] = ()) -> dict[str, Finding]:
    """Of the claims of these names, or of all that come with megarlx."""
    judges: dict[str, Callable[[Study], Finding]] = {
        name: plug.resolve("claim", name) for name in names or plug.ours("claim")
    }
    return {name: judge(study) for name, judge in judges.items()}
