"""The claims P1 to P15 of the paper, each as comparisons over a study.

A cell counts only where SFT's pass@1 is more than twice guessing: beside an SFT that learned
nothing any comparison is hollow.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

from megarlx.report.claims import Claim
from megarlx.report.comparison import Comparison, of_capability, of_suite
from megarlx.report.runs import Evaluation
from megarlx.report.study import BASE, Cell, Study
from megarlx.report.style import name_of
from megarlx.study.claims.counted import counted
from megarlx.study.claims.sweeps import group_sizes, more_data_or_more_parameters


def pass_at(k: int, recipe: str, other: str, low: float, high: float) -> Callable[..., Comparison]:
    def make(study: Study) -> Comparison:
        what = f"{name_of(recipe)} − {name_of(other)}, pass@{k}"
        made = Comparison(what, low, high)
        for cell, before in counted(study, made, study.pairs(recipe, other)):
            made.add(cell, of_suite(cell.headline, before.headline, f"pass_at_{k}"))
        return made

    return make


def higher(k: int, recipe: str, than: str) -> Callable[[Study], Comparison]:
    return pass_at(k, recipe, than, 0.0, inf)


def lower(k: int, recipe: str, than: str) -> Callable[[Study], Comparison]:
    return pass_at(k, recipe, than, -inf, 0.0)


def capability(recipe: str, low: float, high: float) -> Callable[[Study], Comparison]:
    def make(study: Study) -> Comparison:
        made = Comparison(f"{name_of(recipe)} − base, capability", low, high)
        for cell, base in counted(study, made, study.pairs(recipe, BASE)):
            made.add(cell, of_capability(cell, base))
        return made

    return make


def together(*made: Callable[[Study], Comparison]) -> Callable[[Study], list[Comparison]]:
    return lambda study: [make(study) for make in made]


def after_the_first(make: Callable[[Study], Comparison]) -> Callable[[Study], list[Comparison]]:
    """Without the earliest checkpoint, where there is more than one."""

    def made(study: Study) -> list[Comparison]:
        comparison = make(study)
        first = min(study.checkpoints, default=0)
        if len(study.checkpoints) > 1:
            kept = [(c, s) for c, s in comparison.cells if c.checkpoint_tokens != first]
            dropped = [c.run.name for c, _ in comparison.cells if c.checkpoint_tokens == first]
            comparison.cells = kept
            comparison.left_out += [f"{name}: the very first checkpoint" for name in dropped]
        return [comparison]

    return made


def start_of_rl(study: Study, cell: Cell) -> Evaluation | None:
    """What RL began with: the last evaluation inside the run before its first RL step; else that
    of the SFT beside it, where SFT came first; else the earliest inside the run or the base."""
    if cell.headline is None:
        return None
    course = [e for e in cell.run.course(cell.headline.suite) if e is not cell.headline]
    first = cell.run.first_step_with("rl/")
    before = [e for e in course if first is not None and e.iteration < first]
    if before:
        return before[-1]
    if cell.recipe == "sft_then_rl":
        beside = [b.headline for a, b in study.pairs(cell.recipe, "sft") if a is cell]
        return beside[0] if beside else None
    if course:
        return course[0]
    base = study.base_of(cell)
    return base.headline if base else None


def beginnings(recipe: str) -> Callable[[Study], dict[str, Any]]:
    """Which evaluation stands for the beginning of RL in each run."""

    def note(study: Study) -> dict[str, Any]:
        starts = {c.run.name: start_of_rl(study, c) for c in study.of_recipe(recipe)}
        said = {name: f"{e.suite} of step {e.iteration}" for name, e in starts.items() if e}
        return {"rl_began_with": said}

    return note


def since_the_checkpoint(study: Study) -> dict[str, Any]:
    """The whole way of direct RL, where its first evaluation is one on the way."""
    whole = [higher(k, "rl", BASE)(study) for k in (1, 32)]
    points = {f"pass@{k}": c.evidence()["points"] for k, c in zip((1, 32), whole, strict=True)}
    return beginnings("rl")(study) | {"since_the_checkpoint": points}


def within(
    recipe: str, k: int, low: float, high: float, since: str = "start of RL"
) -> Callable[[Study], Comparison]:
    def make(study: Study) -> Comparison:
        made = Comparison(f"{name_of(recipe)}, end − {since}, pass@{k}", low, high)
        cells = [(cell, cell) for cell in study.of_recipe(recipe)]
        for cell, _ in counted(study, made, cells):
            made.add(cell, of_suite(cell.headline, start_of_rl(study, cell), f"pass_at_{k}"))
        return made

    return make


def nll_changes(recipe: str) -> Callable[[Study], dict[str, Any]]:
    """Change of the held-out loss, in nats: the sensitive measure where accuracies saturate."""

    def note(study: Study) -> dict[str, Any]:
        changes: dict[str, list[float]] = {}
        for cell, base in study.pairs(recipe, BASE):
            for suite, after in cell.evaluations.items():
                before = base.evaluations.get(suite)
                if before and "nll" in after.metrics and "nll" in before.metrics:
                    changes.setdefault(suite, []).append(
                        after.metrics["nll"] - before.metrics["nll"]
                    )
        return {"nll_change": {s: round(sum(v) / len(v), 4) for s, v in sorted(changes.items())}}

    return note


def direction_of_sft(study: Study) -> dict[str, Any]:
    """Whether SFT lowers capability at all, beside by how much."""
    lowers = capability("sft", -inf, 0.0)(study)
    told = {"claim": "SFT lowers general capability", "verdict": lowers.verdict()}
    return nll_changes("sft")(study) | {"direction": told}


P1 = Claim(
    "RL pass@1 > base pass@1 at every checkpoint but the very first",
    after_the_first(higher(1, "rl", BASE)),
    at_every_checkpoint=True,
)
P2 = Claim("RL pass@32 > base pass@32 (expansion)", together(higher(32, "rl", BASE)))
P3 = Claim("RL pass@1 > SFT pass@1", together(higher(1, "rl", "sft")))
P4 = Claim("SFT→RL pass@1 > SFT pass@1", together(higher(1, "sft_then_rl", "sft")))
P5 = Claim("SFT→RL pass@32 < SFT pass@32 (sharpening)", together(lower(32, "sft_then_rl", "sft")))
P6 = Claim(
    "within SFT→RL, pass@32 falls while pass@1 rises",
    together(within("sft_then_rl", 1, 0.0, inf), within("sft_then_rl", 32, -inf, 0.0)),
    notes=beginnings("sft_then_rl"),
)
P7 = Claim(
    "within direct RL, pass@1 and pass@32 rise",
    together(*(within("rl", k, 0.0, inf, "its first evaluation") for k in (1, 32))),
    notes=since_the_checkpoint,
)
P8 = Claim(
    "SFT-Gold pass@8 and pass@32 > RL",
    together(higher(8, "sft_gold", "rl"), higher(32, "sft_gold", "rl")),
)
P9 = Claim(
    "parallel pass@32 is the highest of the one-demonstration recipes",
    together(*(higher(32, "parallel", than) for than in ("rl", "sft", "sft_then_rl"))),
)
P10 = Claim("parallel pass@1 < RL pass@1", together(lower(1, "parallel", "rl")))
P11 = Claim(
    "RL changes general capability by at most 0.5 points",
    together(capability("rl", -0.5, 0.5)),
    notes=nll_changes("rl"),
)
P12 = Claim(
    "SFT lowers general capability by 3 to 8 points",
    together(capability("sft", -8.0, -3.0)),
    notes=direction_of_sft,
)
P13 = Claim(
    "parallel keeps general capability within 1 point of base",
    together(capability("parallel", -1.0, 1.0)),
    notes=nll_changes("parallel"),
)
P14 = Claim(
    "more targeted pre-training data raises RL's gain more than more parameters do",
    more_data_or_more_parameters,
)
P15 = Claim("small groups win per FLOP early, large groups per example; same end", group_sizes)
