"""What became of the single questions between two evaluations, and what RL did to coverage."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from megarlx.evaluation.bootstrap import interval_of_mean
from megarlx.evaluation.consistency import Change, Transition, transition
from megarlx.report.comparison import of_suite
from megarlx.report.runs import Evaluation
from megarlx.report.study import BASE, Cell, Study


def moves(before: Evaluation | None, after: Evaluation | None) -> Transition:
    if before is None or after is None or not after.asked_like(before):
        return Transition()
    return transition(before.solved(), after.solved())


def of_recipes(study: Study) -> dict[str, Transition]:
    """From the checkpoint to what a recipe made of it, over checkpoints and seeds."""
    found: dict[str, Transition] = {}
    for cell in study.cells:
        base = study.base_of(cell)
        if cell.recipe == BASE or base is None:
            continue
        found[cell.label] = found.get(cell.label, Transition()) + moves(
            base.headline, cell.headline
        )
    return {label: made for label, made in found.items() if made.questions}


def of_trunks(study: Study) -> dict[tuple[int, int], Transition]:
    """From each studied checkpoint of a trunk to its next, over trunks: (tokens, tokens)."""
    found: dict[tuple[int, int], Transition] = {}
    for trunk in study.trunks:
        bases = [c for c in study.of_recipe(BASE) if c.run is trunk and c.headline]
        for a, b in pairwise(sorted(bases, key=lambda c: c.checkpoint_tokens)):
            key = (a.checkpoint_tokens, b.checkpoint_tokens)
            found[key] = found.get(key, Transition()) + moves(a.headline, b.headline)
    return {key: made for key, made in sorted(found.items()) if made.questions}


def coverage(pairs: Sequence[tuple[Cell, Cell]], ks: Sequence[int]) -> Change | None:
    """Of an excursion's cells beside their base."""
    for k in sorted(ks, reverse=True):
        changes = [
            [
                values
                for cell, base in pairs
                for values in of_suite(cell.headline, base.headline, f"pass_at_{n}").values()
            ]
            for n in (1, k)
        ]
        at_1, at_k = (interval_of_mean(change) for change in changes)
        if at_1 is not None and at_k is not None:
            return Change(k, at_1, at_k)
    return None
