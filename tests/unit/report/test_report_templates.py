"""Answers to other prompts, or measured in another way, are other answers: nothing is subtracted,
and the report says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_sweep import Sweep

from megarlx.cli import main
from megarlx.report import consistency
from megarlx.report.claims import judge_all
from megarlx.report.comparison import of_capability
from megarlx.report.figures import gains
from megarlx.report.result_table import results
from megarlx.report.study import Study
from megarlx.report.summary import summary

ONE = {"user": "question : {content} answer :", "assistant": " {content}"}
OTHER = {"user": "Q: {content}\nA:", "assistant": " {content}"}


def ask_in(template: dict[str, str], root: Path, runs: str) -> None:
    """What the results of these runs say that their questions were written in."""
    paths = list(root.glob(f"{runs}/evaluations/*.math.json"))
    assert paths
    for path in paths:
        result = json.loads(path.read_text())
        path.write_text(json.dumps({**result, "settings": {"template": template}}))


def measure(root: Path, runs: str, suite: str, files: dict[str, str], **changed: Any) -> None:
    """What the results of these runs say that a suite's settings were."""
    own = {"path": "q.jsonl", "temperature": 0.6, "max_new_tokens": 64, "rewards": [], **changed}
    paths = list(root.glob(f"{runs}/evaluations/*.{suite}.json"))
    assert paths
    for path in paths:
        settings = {"template": ONE, "suite": own, "files": {"q.jsonl": "a" * 64, **files}}
        path.write_text(json.dumps({**json.loads(path.read_text()), "settings": settings}))


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
        assert "differences at 2,000,000 tokens, because math was asked in 2 ways" in said
        assert "trunks/seed0 in" in said
    assert r'excursions/rl-2000000-seed0, excursions/sft-2000000-seed0 in {"user": "Q: {' in printed


def test_one_run_asked_in_another_template_is_left_out_alone(root: Path) -> None:
    ask_in(OTHER, root, "excursions/rl-2000000-seed1")
    (comparison,) = judge_all(Study.of(root))["P3"].evidence["comparisons"]
    assert comparison["seeds"] == [0]
    assert comparison["left_out"] == [
        "excursions/rl-2000000-seed1: no questions that both sides were asked alike"
    ]


REWARD = {"function": "mine.py:f", "weight": 1.0, "options": {}}
DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "temperature": ({"temperature": 0.0}, {}, "with temperature 0.0"),
    "room": ({"max_new_tokens": 8}, {}, "with max_new_tokens 8"),
    "questions": ({}, {"q.jsonl": "b" * 64}, "with questions of digest bbbbbbbb"),
    "reward": ({"rewards": [REWARD]}, {}, "with rewards [{'function': 'mine.py:f'"),
    "code": ({"rewards": []}, {"mine.py:f": "b" * 64}, "with mine.py:f of digest bbbbbbbb"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_was_measured_in_another_way_is_not_subtracted_and_both_ways_are_named(
    name: str, root: Path
) -> None:
    changed, files, said = DIFFERENT[name]
    measure(root, "trunks/*", "math", {"mine.py:f": "a" * 64})
    measure(root, "excursions/*", "math", files, **changed)
    study = Study.of(root)
    (against_base,) = judge_all(study)["P1"].evidence["comparisons"]
    assert (against_base["cells"], against_base["points"]) == (0, None)
    assert gains(study, "") is None
    (told, _) = [line for line in study.missing() if line.startswith("differences at 2,000,000")]
    assert "because math was asked in 2 ways: trunks/seed0 with " in told
    assert said in told


def test_more_samples_examples_and_what_is_not_known_of_a_result_keep_nothing_apart(
    root: Path,
) -> None:
    measure(root, "trunks/*", "math", {}, samples=8, few_shot=2, stop_strings=["Q:"])
    explicit = [{"function": "final_number", "weight": 1.0, "options": {}, "workers": 1}]
    measure(root, "excursions/*", "math", {"mine.py:f": "b" * 64}, samples=64, rewards=explicit)
    study = Study.of(root)
    (comparison,) = judge_all(study)["P1"].evidence["comparisons"]
    assert (comparison["cells"], comparison["left_out"]) == (2, [])
    assert not any("asked in" in line for line in study.missing())


def test_capability_is_compared_where_its_suites_were_measured_alike(root: Path) -> None:
    measure(root, "trunks/*", "facts-choice", {}, normalise="none")
    measure(root, "excursions/*", "facts-choice", {}, normalise="bytes")
    study = Study.of(root)
    base, sft = (next(c for c in study.cells if c.recipe == name) for name in ("base", "sft"))
    assert set(of_capability(sft, base)) == {"facts-cloze"}
    assert any("because facts-choice was asked in 2 ways" in line for line in study.missing())


def test_ways_that_differ_behind_what_is_shown_are_counted_as_two(root: Path) -> None:
    files = {"mine.py:f": "a" * 64}
    for runs, limit in {"trunks/*": 1, "excursions/*": 2}.items():
        options = {"text": "x" * 300, "z": limit}
        reward = {"function": "mine.py:f", "weight": 1.0, "options": options}
        measure(root, runs, "math", files, rewards=[reward])
    (told, _) = [line for line in Study.of(root).missing() if line.startswith("differences at 2")]
    assert "because math was asked in 2 ways: trunks/seed0 with rewards " in told


def measured_too(root: Path, runs: str, suite: str, accuracy: float) -> None:
    """A further suite of choices in the results of these runs."""
    paths = list(root.glob(f"{runs}/evaluations/*.facts-choice.json"))
    assert paths
    for path in paths:
        result = json.loads(path.read_text()) | {"suite": suite, "metrics": {"accuracy": accuracy}}
        path.with_name(path.name.replace("facts-choice", suite)).write_text(json.dumps(result))


@pytest.mark.parametrize(
    ("runs", "suite"), [("excursions/sft*", "easy"), ("trunks/*", "facts-choice_average")]
)
def test_a_mean_accuracy_is_that_of_the_suites_that_all_of_a_checkpoint_have(
    root: Path, runs: str, suite: str
) -> None:
    before = results(Study.of(root)).columns[5]
    measured_too(root, runs, suite, accuracy=0.99)
    study = Study.of(root)
    table = results(study)
    assert table.columns[5].header == before.header == "capability, %"
    assert [*table.columns[5].cells] == [*before.cells]
    rows = {row["recipe"]: row["capability"] for row in summary(study, {})["results"]}
    assert rows["base"] == pytest.approx(0.6)
    assert rows["sft"] == pytest.approx(0.545)


def test_a_mean_accuracy_leaves_out_what_was_measured_in_two_ways(root: Path) -> None:
    measure(root, "trunks/*", "facts-choice", {}, normalise="none")
    measure(root, "excursions/*", "facts-choice", {}, normalise="bytes")
    measured_too(root, "excursions/*", "facts-choice", accuracy=0.99)
    study = Study.of(root)
    sft = next(cell for cell in study.cells if cell.recipe == "sft")
    assert study.capability(sft) == sft.evaluations["facts-cloze"].metrics["accuracy"]


def test_nothing_is_marked_as_the_highest_of_what_was_asked_in_two_ways(root: Path) -> None:
    assert any(str(cell).startswith("*") for cell in results(Study.of(root)).columns[2].cells)
    ask_in(OTHER, root, "trunks/*")
    columns = results(Study.of(root)).columns
    for column in columns[2:5]:
        assert column.header.startswith("pass@")
        assert not any(str(cell).startswith("*") for cell in column.cells)
    assert any(str(cell).startswith("*") for cell in columns[5].cells)  # accuracy, asked alike


def test_a_k_that_nothing_has_is_no_column_of_the_table(root: Path) -> None:
    for path in root.glob("*/*/evaluations/*.math.json"):
        result = json.loads(path.read_text())
        result["metrics"].pop("pass_at_32")
        result["items"] = [
            {**item, "samples": 8, "correct": item["correct"] * 8 // item["samples"]}
            for item in result["items"]
        ]
        path.write_text(json.dumps(result))
    headers = [column.header for column in results(Study.of(root)).columns]
    assert [h for h in headers if h.startswith("pass@")] == [
        f"pass@{k}, % (guessing)" for k in (1, 8)
    ]


def test_a_k_that_the_samples_have_is_in_the_table_as_on_the_page(root: Path) -> None:
    for path in root.glob("*/*/evaluations/*.math.json"):
        result = json.loads(path.read_text())
        result["metrics"] = {"pass_at_1": result["metrics"]["pass_at_1"]}
        path.write_text(json.dumps(result))
    study = Study.of(root)
    assert not any(str(cell).startswith("–") for cell in results(study).columns[3].cells)
