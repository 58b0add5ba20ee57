"""How the cost of a GRPO step grows with group size, length of the answers and size of the model.

Points are measured in turn, several times over, and fitted by t = a + b·x (least squares on the
medians). With --markdown a picture is written beside the file.

    python benchmarks/rl_growth.py [--rounds 5] [--json PATH] [--markdown PATH]
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rl_step import Case, our_step, spent
from timing import Row, add_outputs, machine, row, write_results
from training import SIZES

WARM_UP_STEPS = 2


@dataclasses.dataclass(frozen=True)
class Series:
    what: str
    xs: list[float]
    step: list[float]  # seconds
    generate: list[float]

    def fit(self) -> tuple[float, float]:
        """Seconds at 0, and seconds for each 1 more."""
        x = torch.tensor(self.xs, dtype=torch.float64)
        t = torch.tensor(self.step, dtype=torch.float64)
        design = torch.stack((torch.ones_like(x), x), dim=1)
        a, b = torch.linalg.lstsq(design, t[:, None]).solution[:, 0].tolist()
        return a, b

    def worst_miss(self) -> float:
        """Of the line, as a share of the mean."""
        a, b = self.fit()
        away = [abs(t - a - b * x) for x, t in zip(self.xs, self.step, strict=True)]
        return max(away) / statistics.fmean(self.step)


def cases() -> dict[str, list[tuple[float, Case]]]:
    base = Case(SIZES["0.2M"].model, 8, 8, 48)
    return {
        "samples of a prompt": [
            (n, dataclasses.replace(base, samples=n)) for n in (2, 4, 8, 16, 32, 64)
        ],
        "new tokens": [(n, dataclasses.replace(base, new_tokens=n)) for n in (16, 32, 64, 96)],
        "parameters, M": [
            (SIZES[s].model.parameters() / 1e6, dataclasses.replace(base, model=SIZES[s].model))
            for s in ("0.2M", "2M", "10M")
        ],
    }


def measure(what: str, points: list[tuple[float, Case]], rounds: int) -> Series:
    """Round by round over all points, so that what slows the machine for a while slows all."""
    made = [our_step(case) for _, case in points]
    for step, _ in made * WARM_UP_STEPS:
        step()
    whole: list[list[float]] = [[] for _ in made]
    generate: list[list[float]] = [[] for _ in made]
    for _ in range(rounds):
        for (step, objective), times, parts in zip(made, whole, generate, strict=True):
            begun = time.perf_counter()
            step()
            times.append(time.perf_counter() - begun)
            parts.append(spent(objective)["generate"])
    medians = [[statistics.median(one) for one in series] for series in (whole, generate)]
    return Series(what, [x for x, _ in points], *medians)


def plot(found: list[Series], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(11, 3.2), layout="constrained")
    for ax, series in zip(axes, found, strict=True):
        a, b = series.fit()
        ends = [0.0, max(series.xs)]
        ax.plot(ends, [a + b * x for x in ends], color="#0072B2", linewidth=1, label="a + b·x")
        ax.plot(series.xs, series.step, "o", color="#0072B2", label="step")
        ax.plot(series.xs, series.generate, "s", color="#D55E00", label="of it generating")
        ax.set_xlabel(series.what)
        ax.set_ylim(bottom=0)
        ax.grid(color="0.9")
    axes[0].set_ylabel("seconds")
    axes[0].legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def notes_of(found: list[Series]) -> str:
    lines = [
        "| what grows | a, seconds | b, seconds for each more | largest miss |",
        "|---|---|---|---|",
    ]
    for series in found:
        a, b = series.fit()
        lines.append(f"| {series.what} | {a:.4f} | {b:.5f} | {series.worst_miss():.0%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    add_outputs(parser)
    options: Any = parser.parse_args()
    facts = machine()
    found = [measure(what, points, options.rounds) for what, points in cases().items()]
    rows: list[Row] = []
    for series in found:
        a, b = series.fit()
        for x, seconds in zip(series.xs, series.step, strict=True):
            rows.append(
                row("GRPO step", f"{series.what}: {x:g}", seconds, a + b * x, "a + b·x", "s")
            )
    notes = notes_of(found)
    print(notes)
    if options.markdown:
        picture = options.markdown.with_suffix(".png")
        plot(found, picture)
        notes = f"![seconds a step against what grows]({picture.name})\n\n" + notes
    write_results(options, "How the cost of a GRPO step grows", facts, rows, notes)


if __name__ == "__main__":
    main()
