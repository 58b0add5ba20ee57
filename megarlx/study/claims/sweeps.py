"""P14 and P15: claims over sweeps of their own, `composition` and `group_size`."""

from __future__ import annotations

from collections import defaultdict
from math import inf

from megarlx.evaluation.bootstrap import Values, differences
from megarlx.report.comparison import Comparison, of_suite
from megarlx.report.runs import Run
from megarlx.report.settings import parameters, setting_named
from megarlx.report.study import BASE, Cell, Study
from megarlx.study.claims.counted import counted

TARGETED = ("math", "problem")  # in the name of a source: what the questions are about
SAME_END = 2.0  # points of pass@1 within which two ends are the same
EARLY = 0.25  # the share of the budget both have spent that counts as early


def target_share(cell: Cell) -> float | None:
    """Of the tokens the checkpoint has seen, those of targeted sources."""
    tokens = cell.run.composition or (cell.trunk.composition if cell.trunk else {})
    if not tokens and cell.trunk is not None:
        for line in cell.trunk.metrics:
            tokens = {k: v for k, v in line.items() if k[:5] == "data/"} or tokens
    total = sum(tokens.values())
    if not total:
        return None
    return sum(n for source, n in tokens.items() if any(t in source for t in TARGETED)) / total


def more_data_or_more_parameters(study: Study) -> list[Comparison]:
    """RL's gain of the small model on the targeted mix, minus that of the large on the plain mix.

    Both differ from the small model on the plain mix by one thing, so its gain cancels out.
    """
    made = Comparison(
        "gain of RL in pass@1: small model on more targeted data − large model on less", 0.0, inf
    )
    by_place: defaultdict[tuple[int, int], dict[tuple[int, float], tuple[Cell, Values]]]
    by_place = defaultdict(dict)
    for cell, base in counted(study, made, study.pairs("rl", BASE), needs_sft=False):
        gain = of_suite(cell.headline, base.headline, "pass_at_1")
        size = parameters(cell.trunk) if cell.trunk else None
        share = target_share(cell)
        if size is None or share is None or not gain:
            made.left_out.append(f"{cell.run.name}: its gain, size or share of data is not known")
            continue
        at = (cell.checkpoint_tokens, cell.seed)
        by_place[at][size, round(share, 2)] = (cell, next(iter(gain.values())))
    for (tokens, seed), gains in by_place.items():
        sizes = sorted({size for size, _ in gains})
        shares = sorted({share for _, share in gains})
        data = gains.get((sizes[0], shares[-1]))
        scale = gains.get((sizes[-1], shares[0]))
        if len(sizes) < 2 or len(shares) < 2 or data is None or scale is None:
            made.left_out.append(
                f"{tokens:,} tokens, seed {seed}: needs two model sizes and two shares of targeted "
                f"data; sizes {sizes}, shares {shares}"
            )
            continue
        made.add(data[0], {study.headline or "": differences(data[1], scale[1])})
    return [made]


def group_sizes(study: Study) -> list[Comparison]:
    early = f"with {EARLY:.0%} of the budget both have spent"
    per_flop = Comparison(f"small − large groups, pass@1 {early}, by FLOP", 0.0, inf)
    per_example = Comparison(f"large − small groups, pass@1 {early}, by examples", 0.0, inf)
    end = Comparison("large − small groups, pass@1 at the end", -SAME_END, SAME_END)
    pairs = _small_and_large(study, per_flop)
    for small, large in counted(study, per_flop, pairs, needs_sft=False):
        by_flop = _early_gap(study, small.run, large.run, "flop")
        by_examples = _early_gap(study, small.run, large.run, "examples")
        per_flop.add(small, {"": {q: -v for q, v in by_flop.items()}})
        per_example.add(small, {"": by_examples})
        end.add(small, of_suite(large.headline, small.headline, "pass_at_1"))
    return [per_flop, per_example, end]


def _small_and_large(study: Study, made: Comparison) -> list[tuple[Cell, Cell]]:
    by_place: defaultdict[tuple[str, int, int], dict[int, Cell]] = defaultdict(dict)
    for cell in study.of_recipe("rl"):
        size = setting_named(cell.run, "samples_per_prompt")
        if isinstance(size, int) and cell.headline:
            by_place[cell.place][size] = cell
    found = []
    for (_, tokens, seed), cells in by_place.items():
        if len(cells) > 1:
            found.append((cells[min(cells)], cells[max(cells)]))
        else:
            made.left_out.append(f"{tokens:,} tokens, seed {seed}: one group size, {min(cells)}")
    return found


def _early_gap(study: Study, small: Run, large: Run, unit: str) -> dict[str, float]:
    """pass@1 of large minus small groups, once both have spent the same early budget."""
    courses = [_spent(study, run, unit) for run in (small, large)]
    if any(len(course) < 2 for course in courses):
        return {}
    budget = EARLY * min(course[-1][0] for course in courses)
    at_budget = [_interpolated(course, budget) for course in courses]
    return differences(at_budget[1], at_budget[0])


def _spent(study: Study, run: Run, unit: str) -> list[tuple[float, Values]]:
    """(budget spent, pass@1 of each question) of a run's evaluations; those without are left out.

    A start that was not evaluated inside the run is that of the checkpoint it came from.
    """
    prompts = setting_named(run, "prompts_per_step")
    found: list[tuple[float, Values]] = []
    course = run.course(study.headline or "")
    for e in course:
        if unit == "flop":
            spent = 0.0 if e.iteration == 0 else run.cost(e.iteration).get("flop")
        else:
            spent = e.iteration * float(prompts) if isinstance(prompts, int) else None
        if spent is not None:
            found.append((spent, e.percent("pass_at_1")))
    parent = study.parent_of(run)
    if parent is not None and run.parent is not None and (not found or found[0][0] > 0):
        at_start = parent.at(run.parent.iteration)
        start = at_start.get(study.headline or "") or at_start.get(f"{study.headline}_few_shot")
        if start is not None and all(start.asked_like(e) for e in course):
            found.insert(0, (0.0, start.percent("pass_at_1")))
    return found


def _interpolated(course: list[tuple[float, Values]], budget: float) -> dict[str, float]:
    """Between the two evaluations around the budget, question by question."""
    after = next((i for i, (spent, _) in enumerate(course) if spent >= budget), len(course) - 1)
    before = max(after - 1, 0)
    (x0, y0), (x1, y1) = course[before], course[after]
    share = (budget - x0) / (x1 - x0) if x1 > x0 else 1.0
    return {q: y0[q] + share * (y1[q] - y0[q]) for q in y0 if q in y1}
