"""The walk done a fifth time: dates to be written out, with a reward that gives partial credit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from public_models import tiny_model

from megarlx.cli import main

MONTHS = ("Mai", "Juni", "März")
RECIPE = """
[training]
sequence_length = 64
sequences_per_step = 2
sequences_per_microbatch = 2
[template]
user = "Frage: {content}\\nAntwort:"
assistant = " {content}"
[sft]
conversations = "dates.jsonl"
[rl]
prompts = "dates.jsonl"
prompts_per_step = 2
samples_per_prompt = 4
max_completion_tokens = 4
rewards = [{ function = "graded.py:letters" }]
[[stages]]
steps = 1
objectives = { sft = { lr = 1e-3 } }
[[stages]]
steps = 1
objectives = { rl = { lr = 1e-3 } }
[checkpoints]
save_every_steps = 1
[evaluation]
at_end = true
[[evaluation.suites]]
name = "dates"
kind = "pass_at_k"
path = "dates.jsonl"
samples = 2
ks = [1]
max_new_tokens = 4
rewards = [{ function = "graded.py:letters", workers = 0 }]
"""
REWARD = """
def letters(samples):
    return [0.5 * (len(s.completion.encode()) % 2) for s in samples]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("fifth")
    tiny_model(folder / "model")
    rows = [
        {"question": f"2021-{n}-{day}", "answer": f"{day}. {month} 2021"}
        for n, month in enumerate(MONTHS)
        for day in (1, 2)
    ]
    (folder / "dates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "graded.py").write_text(REWARD)
    return folder


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def branch(out: str, *sets: str) -> int:
    words = [word for one in sets for word in ("--set", one)]
    return main(["branch", "model", "recipe.toml", "--out", out, *words])


@pytest.mark.parametrize("function", ["graded.py:leters", "grade.py:letters"])
def test_a_reward_that_is_not_there_is_told_before_the_stages_that_come_first(
    function: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = f"runs/{function}"
    assert branch(out, f"rl.rewards.0.function={function}") == 1
    assert f"reward {function}: could not start" in capsys.readouterr().err
    assert not Path(out).exists()


def test_an_answer_key_that_no_line_has_is_refused_by_rl_and_by_a_suite(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for where in ("rl", "evaluation.suites.0"):
        assert branch("runs/keys", f"{where}.answer_key=Answer") == 1
        said = "dates.jsonl: answer_key is 'Answer', and no line has it (other keys of the first: "
        assert f"{said}answer)" in capsys.readouterr().err
    assert not Path("runs/keys").exists()


@pytest.fixture(scope="module")
def graded(folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert branch("runs/graded") == 0
    return folder / "runs" / "graded"


def measured(run: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "evaluations" / f"iter_{name}.json").read_text())
    return found


def test_who_guesses_answers_with_a_number_in_them_guesses_all_of_them(graded: Path) -> None:
    # No answer is that of another question; every year is.
    assert measured(graded, "00000002.dates")["guessing"] == {"pass_at_1": 0.0}


def test_a_suite_is_named_whose_file_is_not_below_the_folder_that_one_is_in(
    graded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "graded.py").write_text(REWARD)
    assert main(["evaluate", str(graded), "--trust", "graded.py:letters"]) == 1
    assert "suite dates: path is 'dates.jsonl': there is no such file" in capsys.readouterr().err


def test_with_partial_credit_groups_inform_before_any_answer_is_right(graded: Path) -> None:
    probe = measured(graded, "00000001.rl-readiness")
    lines = (graded / "metrics.jsonl").read_text().splitlines()
    (logged,) = [row for row in map(json.loads, lines) if "rl/informative_groups" in row]
    assert probe["metrics"]["pass_at_1"] == logged["rl/pass_at_1"] == 0
    counts = [item["alike"] for item in probe["items"]]
    assert all(sum(alike) == 4 for alike in counts)
    assert probe["metrics"]["informative_groups"] == sum(len(c) > 1 for c in counts) / len(counts)
    assert min(probe["metrics"]["informative_groups"], logged["rl/informative_groups"]) > 0
