"""Answers to other prompts are other answers: nothing is subtracted, and the report says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_sweep import Sweep

from megarlx.cli import main
from megarlx.report import consistency
from megarlx.report.claims import judge_all
from megarlx.report.figures import gains
from megarlx.report.study import Study

ONE = {"user": "question : {content} answer :", "assistant": " {content}"}
OTHER = {"user": "Q: {content}\nA:", "assistant": " {content}"}


def ask_in(template: dict[str, str], root: Path, runs: str) -> None:
    """What the results of these runs say that their questions were written in."""
    paths = list(root.glob(f"{runs}/evaluations/*.math.json"))
    assert paths
    for path in paths:
        result = json.loads(path.read_text())
        path.write_text(json.dumps({**result, "settings": {"template": template}}))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    Sweep(tmp_path, checkpoints=(2_000_000,)).write(["sft", "rl"])
    ask_in(ONE, tmp_path, "trunks/*")
    ask_in(ONE, tmp_path, "excursions/*")
    return tmp_path


def test_what_was_asked_alike_is_compared(root: Path) -> None:
    study = Study.of(root)
    (comparison,) = judge_all(study)["P1"].evidence["comparisons"]
    assert (comparison["cells"], comparison["left_out"]) == (2, [])
    assert comparison["points"] > 10
    assert gains(study, "") is not None
    assert set(consistency.of_recipes(study)) == {"rl", "sft"}
    assert not any("template" in line for line in study.missing())


def test_what_was_asked_in_another_template_is_not_subtracted_and_both_are_named(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask_in(OTHER, root, "excursions/*")
    study = Study.of(root)
    found = judge_all(study)
    (against_base,) = found["P1"].evidence["comparisons"]
    assert (against_base["cells"], against_base["points"]) == (0, None)
    assert all("asked alike" in reason for reason in against_base["left_out"])
    assert len(against_base["left_out"]) == 2
    # Both sides of these were asked alike: in the same template, or in none.
    for name in ("P3", "P11"):
        assert [c["cells"] for c in found[name].evidence["comparisons"]] == [2]
    assert gains(study, "") is None
    assert consistency.of_recipes(study) == {}
    assert main(["report", str(root)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    page = (root / "report" / "index.html").read_text()
    for said in (printed, page):
        assert "differences at 2,000,000 tokens, because math was asked in 2 templates" in said
        assert "trunks/seed0 in" in said
    assert r'excursions/rl-2000000-seed0, excursions/sft-2000000-seed0 in {"user": "Q: {' in printed


def test_one_run_asked_in_another_template_is_left_out_alone(root: Path) -> None:
    ask_in(OTHER, root, "excursions/rl-2000000-seed1")
    (comparison,) = judge_all(Study.of(root))["P3"].evidence["comparisons"]
    assert comparison["seeds"] == [0]
    assert comparison["left_out"] == [
        "excursions/rl-2000000-seed1: no questions that both sides were asked alike"
    ]
