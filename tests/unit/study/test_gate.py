"""The gate's lines and the rule of tuning, on runs whose outcomes are known."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "report"))
from fake_sweep import AS_IN_THE_PAPER, Outcome, Sweep

from megarlx.cli import main
from megarlx.report.study import Study
from megarlx.study.gate import Spread, gate, known, passed
from megarlx.study.tuning import candidates, chosen, dials

TOKENS = (1_000_000, 2_000_000)
SEEDS = (0, 1, 2)
GOOD = {"marked": 0.08, "right_of_marked": 0.7, "pass_at_1": 0.06, "pass_at_32": 0.6}


def measured(root: Path, **changes: Any) -> Path:
    """A sweep that passes; `changes` of the last seed at the last checkpoint, `rl_` after RL."""
    Sweep(root, checkpoints=TOKENS, seeds=SEEDS, questions=10, tests=10).write(["rl"])
    for file in root.rglob("iter_*.math.json"):
        after = "excursions" in str(file)
        held = json.loads(file.read_text())
        worse = "seed2" in str(file) and held["trunk_tokens"] == TOKENS[-1]
        found = GOOD | ({"pass_at_1": 0.7, "pass_at_32": 0.9} if after else {})
        if worse:
            own = {k.removeprefix("rl_"): v for k, v in changes.items() if ("rl_" in k) == after}
            found |= {key: value for key, value in own.items() if key in found}
        held["metrics"] |= found
        held["standard_errors"] = dict.fromkeys(found, 0.02)
        file.write_text(json.dumps(held))
        if not after:
            known = 0.5 + held["trunk_tokens"] / 1e8
            known = changes.get("known", known) if worse else known
            made = held | {"suite": "lookups", "kind": "lookups", "items": []}
            made |= {"metrics": {"probability": known}}
            (file.parent / file.name.replace("math", "lookups")).write_text(json.dumps(made))
    return root


def test_a_world_that_is_much_alike_over_seeds_passes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = measured(tmp_path)
    lines = gate(Study.of(root))
    assert len(lines) == 2 * 5 + 1  # five demands at each checkpoint, and between them the rise
    assert passed(lines) is True
    assert main(["study", "gate", str(root)]) == 0
    assert "The gate is passed." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "demand"),
    [
        ({"right_of_marked": 0.55}, "standard deviation of P(right | marked)"),
        ({"rl_pass_at_1": 0.58}, "standard deviation of pass@1 after RL"),
        ({"marked": 0.21}, "marked share 4 to 20% in every seed"),
        ({"marked": 0.039}, "marked share 4 to 20% in every seed"),
        ({"pass_at_32": 1.25}, "mean pass@32 of the bases 30 to 80%"),
        ({"rl_pass_at_32": 1.1}, "mean pass@32 after RL below 95%"),
        ({"known": 0.5}, "lookups known better than at 1,000,000 tokens in every seed"),
    ],
)
def test_each_line_fails_by_itself(
    tmp_path: Path, changes: dict[str, float], demand: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = measured(tmp_path, **changes)
    failed = [line for line in gate(Study.of(root)) if line.held is False]
    assert [(line.checkpoint_tokens, line.demand[: len(demand)]) for line in failed] == [
        (TOKENS[-1], demand)
    ]
    assert main(["study", "gate", str(root)]) == 3
    assert "The gate is not passed." in capsys.readouterr().out


def test_how_the_rest_goes_with_what_is_known_is_told_of_three_seeds(tmp_path: Path) -> None:
    assert [text.split(";")[1] for text in known(Study.of(measured(tmp_path)))] == [
        " correlation with P(right | marked) –, with pass@1 after RL –",
    ] * len(TOKENS)
    changed = measured(tmp_path / "other", known=0.4, right_of_marked=0.3, rl_pass_at_1=0.8)
    first, last = known(Study.of(changed))
    assert first.startswith("1,000,000 tokens: lookups known over seeds, mean 51.0, ")
    assert "mean 48.0, standard deviation 6.9; " in last  # of 52, 52 and 40
    assert last.endswith("P(right | marked) 1.00, with pass@1 after RL -1.00")


def test_what_is_not_measured_leaves_the_gate_open(tmp_path: Path) -> None:
    root = measured(tmp_path)
    for file in root.rglob("iter_*.lookups.json"):
        file.unlink()
    assert passed(gate(Study.of(root))) is None
    assert main(["study", "gate", str(root)]) == 75


def test_the_spread_between_seeds_is_free_of_what_sampling_adds() -> None:
    draw = np.random.default_rng(0)
    true = draw.normal(70, 4.0, size=20_000)
    errors = draw.uniform(2, 8, size=20_000)
    spread = Spread.of([*(true + errors * draw.normal(size=20_000))], [*errors])
    assert spread.between == pytest.approx(4.0, abs=0.2)
    assert spread.whole == pytest.approx((16 + 28) ** 0.5, abs=0.2)
    assert Spread.of([1.0, 2.0], [3.0, 3.0]).between == 0.0


def tuned(root: Path) -> Path:
    sweep = Sweep(root, checkpoints=TOKENS[1:], seeds=(0, 1), questions=60, tests=10, grows=0.0)
    plain, worse = AS_IN_THE_PAPER["sft_then_rl"], Outcome(0.30, 0.55)
    for seed in sweep.seeds:
        trunk = sweep.trunk(seed)
        for recipe, rate, share, outcome in (
            ("rl", 1e-4, None, AS_IN_THE_PAPER["rl"]),
            ("rl", 2e-4, None, worse),
            ("sft_then_rl", 1e-3, 0.0, plain),
            ("sft_then_rl", 1e-3, 0.05, Outcome(0.48, 0.80)),  # widens: against P5
        ):
            sweep.outcomes[recipe] = outcome
            name = f"{recipe}-{rate}-{share}-seed{seed}"
            run = sweep.excursion(trunk, recipe, TOKENS[1], seed, name=name)
            resolved = json.loads((run / "resolved.json").read_text())
            resolved["stages"][-1]["lr"] = rate
            if share is not None:
                resolved["data"] = {"options": {"settings": {"foreign_share": share}}}
            (run / "resolved.json").write_text(json.dumps(resolved))
    return root


def test_the_rule_takes_the_highest_mean_and_the_dial_with_most_claims(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = Study.of(tuned(tmp_path))
    found = candidates(study)
    assert len(found) == 4
    best = chosen(found)
    assert [one.recipe for one in best] == ["rl", "sft_then_rl", "sft_then_rl"]
    assert "0.0001" in best[0].label
    first, second = dials(study, found)
    assert first.value == "foreign_share 0.0"
    assert set(first.in_direction) == {"P3", "P4", "P5", "P7"}
    assert "P5" not in second.in_direction
    assert main(["study", "tuning", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("chosen") == 4
