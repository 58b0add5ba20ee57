"""Which cells count for a claim: beside an SFT that learned nothing any comparison is hollow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from megarlx.report.comparison import Comparison
from megarlx.report.study import Cell, Study

TIMES_GUESSING = 2.0


def why_not_counted(study: Study, cell: Cell, *, needs_sft: bool = True) -> str | None:
    """None where the SFT of the cell's place has learned more than to guess.

    Sweeps of RL alone have no SFT: with `needs_sft` off a cell then stands for itself.
    """
    beside = [c for c in study.cells if c.place == cell.place and c.headline]
    sft = [c for c in beside if c.recipe == "sft"] or [c for c in beside if c.recipe == "sft_gold"]
    if not sft:
        if needs_sft or cell.headline is None:
            return f"{cell.run.name}: no evaluated SFT beside it"
        sft = [cell]
    for other in sft:
        assert other.headline is not None  # chosen above
        guessing = other.headline.guessing.get("pass_at_1")
        if guessing is None:
            return f"{cell.run.name}: {other.run.name} has no guessing baseline"
        reached = other.headline.metrics.get("pass_at_1", 0.0)
        if not reached > TIMES_GUESSING * guessing:
            whose = "its" if other is cell else "SFT's"
            return (
                f"{cell.run.name}: {whose} pass@1 is {100 * reached:.1f}%, not above "
                f"{TIMES_GUESSING:g} x guessing ({100 * guessing:.1f}%)"
            )
    return None


def counted(
    study: Study,
    comparison: Comparison,
    pairs: Iterable[tuple[Cell, Cell]],
    *,
    needs_sft: bool = True,
) -> Iterator[tuple[Cell, Cell]]:
    """The pairs that count; why others do not is told in the comparison."""
    for cell, other in pairs:
        reason = why_not_counted(study, cell, needs_sft=needs_sft)
        if reason is None:
            yield cell, other
        else:
            comparison.left_out.append(reason)
