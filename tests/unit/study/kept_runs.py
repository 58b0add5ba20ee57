"""Runs of the kept study whose outcomes are known."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megarlx.report.runs import Evaluation, Parent, Part, Run

MIDDLE, END = 1750, 2500


def evaluation(
    at: int, m: float, a: float, suite: str = "math", capability: float | None = None
) -> Iterator[Evaluation]:
    """m and a in percent: 4 questions of 25 samples, all alike."""
    y = m * a / 1e4
    correct = round(100 * y)
    items = tuple(
        {"id": f"q{i}", "samples": 100, "correct": correct, "marked": round(m)} for i in range(4)
    )
    metrics = {"pass_at_1": y, "pass_at_32": min(1.0, y + 0.2)}
    metrics |= {"marked": m / 100, "right_of_marked": a / 100}
    yield Evaluation(suite, "pass_at_k", at, 1000, metrics, {}, {}, items)
    if capability is not None:
        one = ({"id": "f", "correct": capability > 50},)
        yield Evaluation("facts", "choice", at, 1000, {"accuracy": capability / 100}, {}, {}, one)


def lookups(at: int, percent: float, suite: str = "withheld") -> Evaluation:
    return Evaluation(suite, "lookups", at, 1000, {"probability": percent / 100}, {}, {}, ())


def made_run(
    name: str,
    seed: int,
    evaluations: list[Evaluation],
    parent: tuple[str, int] | None = None,
    parts: tuple[Part, ...] = (),
    flop: float = 0.0,
) -> Run:
    path = Path("kept") / f"{name}-seed-{seed}"
    above = (
        None if parent is None else Parent(f"kept/{parent[0]}-seed-{seed}", parent[1], 1000, True)
    )
    steps = max((e.iteration for e in evaluations), default=0)
    settings: dict[str, object] = {"stages": [{"steps": steps, "objectives": {"rl": {}}}]}
    if name.startswith("rl_early"):
        after = {"steps": steps - 80, "objectives": {"pretraining": {}}}
        settings = {"stages": [{"steps": 80, "objectives": {"rl": {}}}, after]}
    settings = {"training": {"steps": END}} if name == "trunk" else settings
    lines = tuple({"step": float(e.iteration), "cost/flop": flop} for e in evaluations)
    recipe = None if parent is None else "transplant" if parts else "rl"
    own = tuple(sorted(evaluations, key=lambda e: (e.iteration, e.suite)))
    return Run(path, path.name, recipe, seed, 0, above, {}, settings, lines, own, parts)


def flat(*groups: Iterator[Evaluation] | Evaluation) -> list[Evaluation]:
    return [e for g in groups for e in ([g] if isinstance(g, Evaluation) else g)]
