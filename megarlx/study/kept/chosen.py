"""What the tuning seeds choose: α of each kind of vector, each arm's rate for so many late steps.

By the highest mean of pass@1 over both seeds, on validation questions; ties go to the smaller.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from megarlx.study.kept.arms import Arms, evaluation, last_step, late_steps

PATH = Path("configs/kept_chosen.toml")
CHOOSING = "validation"
ALPHA = re.compile(r"(.+)-alpha-([\d.]+)")

Choices = dict[str, dict[str, float]]  # what is chosen, by candidate


def alphas(trunks: Sequence[Arms]) -> Choices:
    """Of each kind of vector, pass@1 by α; only what every seed has."""
    found: dict[str, dict[str, list[float]]] = {}
    for arms in trunks:
        for name, run in arms.runs.items():
            measured = evaluation(run, last_step(run), CHOOSING)
            if (match := ALPHA.fullmatch(name)) is not None and measured is not None:
                values = found.setdefault(match[1], {}).setdefault(match[2], [])
                values.append(100 * measured.metrics["pass_at_1"])
    return _means(found, len(trunks))


def rates(trunks: Sequence[Arms], starts: Sequence[str]) -> Choices:
    """Of each start and number of late steps, pass@1 by rate: "vector-rl at 20"."""
    found: dict[str, dict[str, list[float]]] = {}
    for arms in trunks:
        for start in starts:
            for rate, run in arms.rates(start).items():
                for k in late_steps(trunks):
                    measured = evaluation(run, k, CHOOSING)
                    if measured is not None:
                        values = found.setdefault(key(start, k), {}).setdefault(rate, [])
                        values.append(100 * measured.metrics["pass_at_1"])
    return _means(found, len(trunks))


def corpus_steps(trunks: Sequence[Arms]) -> int | None:
    """Steps of pre-training that cost what early RL does, to the nearest ten."""
    found = []
    for arms in trunks:
        rl, done = arms.of("rl", arms.middle), arms.trunk.steps_done
        spent = arms.trunk.cost().get("flop", 0.0)
        if rl is not None and done and spent:
            found.append(arms.flop(rl)[0] / (spent / done))
    return round(fmean(found) / 10) * 10 if found else None


def key(start: str, k: int) -> str:
    return f"{start or 'late-only'} at {k}"


def best(candidates: Mapping[str, float]) -> str:
    return min(candidates, key=lambda name: (-candidates[name], float(name)))


def _means(found: Mapping[str, Mapping[str, Sequence[float]]], seeds: int) -> Choices:
    return {
        what: {name: fmean(values) for name, values in sorted(by.items()) if len(values) == seeds}
        for what, by in sorted(found.items())
    }


def frozen_rates(world: str, path: Path = PATH) -> dict[str, str]:
    """key(start, k) -> the rate that was chosen in this world, as it stands in a run's name."""
    if not path.exists():
        return {}
    held = tomllib.loads(path.read_text(encoding="utf-8"))
    return {name: f"{rate:g}" for name, rate in held.get(world, {}).get("rates", {}).items()}
