"""The examples run as they stand, on a smaller world and for fewer steps."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from training_runs import ROOT

EXAMPLES = ROOT / "docs" / "examples"


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_an_example_trains_and_another_branches_from_it(tmp_path: Path) -> None:
    trunk, small = tmp_path / "trunk", ("evaluation={}", "checkpoints={}")
    said = run(
        *("pretrain", str(trunk), "training.steps=4", "optimizer.warmup_steps=2"),
        *(f'data.folder="{tmp_path}/world"', "data.options.documents=400", *small),
    )
    assert "step 4/4: loss" in said
    said = run(
        *("rl", f"{trunk}@latest", str(tmp_path / "rl"), "stages.0.steps=2"),
        *("stages.0.objectives.rl.warmup_steps=0", "rl.prompts_per_step=2", *small),
    )
    assert said.count("characters an answer") == 2
    said = run("rl_loop", f"{trunk}@latest", "2")
    assert re.findall(r"^(\d): reward 0\.\d+, loss", said, re.MULTILINE) == ["0", "1"]


def test_a_loop_of_rl_is_twenty_lines() -> None:
    text = (EXAMPLES / "rl_loop.py").read_text()
    body = re.search(r"^def main.*?(?=^if __name__)", text, re.MULTILINE | re.DOTALL)
    assert body is not None
    assert len([line for line in body[0].splitlines() if line.strip()]) <= 20


def test_averaging_in_a_loop_of_its_own_reaches_between_two_targets() -> None:
    first, second = map(float, re.findall(r"\d+\.\d+", run("average")))
    assert 0 < first < second  # the shares are 0.8 and 0.2


def test_every_example_is_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 60, path.name
