"""What pre-training leaves of RL: read off runs whose gains are known."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_sweep import Outcome, Sweep

from megarlx.report.drawing import Figure
from megarlx.report.figures_of_placement import placement
from megarlx.report.study import Study

AT_FIRST, LATER, UNMEASURED = 1_000_000, 2_000_000, 1_500_000
OUTCOMES = {"base": Outcome(0.20, 1.0), "rl_early": Outcome(0.60, 1.0, 0.6)}


def sweep(root: Path) -> Sweep:
    return Sweep(
        root, OUTCOMES, checkpoints=(AT_FIRST, LATER), questions=300, tests=100, steps=60, grows=0.0
    )


def written(root: Path, left: float, seeds: tuple[int, ...] = (0, 1)) -> Figure | None:
    """RL at the first checkpoint, then pre-training, which leaves so much of the gain."""
    made = sweep(root)
    after = OUTCOMES["base"].between(OUTCOMES["rl_early"], left)
    for seed in (0, 1):
        run = made.excursion(made.trunk(seed), "rl_early", AT_FIRST, seed)
        if seed in seeds:
            made.evaluate(run, 90, UNMEASURED, OUTCOMES["rl_early"], seed)
        made.evaluate(run, 160, LATER, after, seed)
    return placement(Study.of(root))


def rows(figure: Figure | None) -> dict[tuple[str, str], dict[str, str]]:
    assert figure is not None
    head, *lines = figure.table
    return {(line[0], line[1]): dict(zip(head, line, strict=True)) for line in lines}


def number(text: str) -> float:
    return float(text.split()[0].rstrip("%"))


@pytest.mark.parametrize("left", [0.25, 1.0])
def test_what_is_left_is_the_share_of_the_gain_at_equal_tokens(tmp_path: Path, left: float) -> None:
    found = rows(written(tmp_path, left))
    first, later = found["rl_early", "1M"], found["rl_early", "2M"]
    assert number(first["Δ pass@1, points"]) == pytest.approx(40, abs=2)
    assert number(later["Δ pass@1, points"]) == pytest.approx(40 * left, abs=2)
    assert first["left of Δ pass@1"] == "–"
    assert number(later["left of Δ pass@1"]) == pytest.approx(100 * left, abs=5)
    assert number(found["base", "2M"]["pass@1, %"]) == pytest.approx(20, abs=2)
    assert found["base", "2M"]["Δ pass@1, points"] == "–"
    assert number(later["Δ capability, points"]) == 0


def test_where_the_trunk_was_not_measured_there_is_no_gain(tmp_path: Path) -> None:
    between = rows(written(tmp_path, 0.5))["rl_early", "1.5M"]
    assert number(between["pass@1, %"]) == pytest.approx(60, abs=2)
    assert between["Δ pass@1, points"] == between["left of Δ pass@1"] == "–"


def test_what_was_not_measured_in_every_run_is_not_averaged(tmp_path: Path) -> None:
    assert ("rl_early", "1.5M") not in rows(written(tmp_path, 0.5, seeds=(0,)))


def test_runs_that_add_no_pretraining_are_not_drawn(tmp_path: Path) -> None:
    made = sweep(tmp_path)
    made.excursion(made.trunk(0), "rl_early", AT_FIRST, 0)
    assert placement(Study.of(tmp_path)) is None
