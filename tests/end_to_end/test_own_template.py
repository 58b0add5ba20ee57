"""A converted model is asked as its reader says, or not at all; what trains nothing gains nothing.

The files are those of docs/own_model.md, made small, without any learning rate.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from documents import fenced
from public_models import tiny_model
from test_own_model import SMALLER
from training_runs import ROOT, tool

from megarlx.cli import main
from megarlx.report.figures import gains
from megarlx.report.study import Study

pytest.importorskip("transformers")

FILE = re.compile(r"^cat > (\S+) <<'END'\n(.*?)^END$", re.MULTILINE | re.DOTALL)
TEMPLATE = re.compile(r"^\[template\]\n.*?\n\n", re.MULTILINE | re.DOTALL)
NOTHING = [word for i, name in enumerate(("sft", "rl")) for word in
           ("--set", f"stages.{i}.objectives.{name}.lr=0")]  # fmt: skip
# Text of a model that knows nothing gets it half of the time.
REWARD = """
def right_and_short(samples, limit=400):
    return [float(len(sample.completion) % 2) for sample in samples]
"""
SUITES = Path("data/mine/suites.toml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documented files, and the model as a run."""
    folder = tmp_path_factory.mktemp("mine")
    for block in fenced(ROOT / "docs" / "own_model.md", "bash"):
        for name, text in FILE.findall(block):
            for shown, small in SMALLER.items():
                text = text.replace(shown, small)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    (folder / "my_reward.py").write_text(REWARD)
    questions = [{"question": f"{n} and 1 ?", "answer": str(n + 1)} for n in range(6)]
    lines = "".join(json.dumps(one) + "\n" for one in questions)
    (folder / "data/mine/test.jsonl").write_text(lines)
    tiny_model(folder / "model")
    folders = [str(folder / "model"), str(folder / "runs" / "base")]
    words = ["--from", "hf", "--to", "megarlx", *folders, "--quiet"]
    assert tool("convert_checkpoint").main(words) == 0
    return folder


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))


def base_result() -> dict:
    return json.loads(Path("runs/base/evaluations/iter_00000000.mine.json").read_text())


def test_a_run_that_trains_nothing_is_reported_to_gain_nothing() -> None:
    recipe = "data/mine/sft_then_rl.toml"
    assert main(["branch", "runs/base", recipe, "--out", "runs/rl", *NOTHING]) == 0
    assert main(["evaluate", "runs/base", "--config", str(SUITES)]) == 0
    base = base_result()
    assert base["settings"]["template"]["user"] == "Question: {content}\nAnswer:"
    right = [item["correct"] for item in base["items"]]
    assert 0 < sum(right) < sum(item["samples"] for item in base["items"])
    figure = gains(Study.of(Path("runs")), "")
    assert figure is not None
    heading, *rows = figure.table
    assert heading == ["from tokens", "recipe", "pass@1, points gained"]
    assert rows == [["0", "SFT→RL", "0.0 [0.0, 0.0]"]]

    # The same model asked in other words answers otherwise: then there is no difference to tell.
    other = Path("other.toml")
    other.write_text(SUITES.read_text().replace("Question: ", "Q. "))
    assert main(["evaluate", "runs/base", "--config", str(other)]) == 0
    assert [item["correct"] for item in base_result()["items"]] != right
    study = Study.of(Path("runs"))
    assert gains(study, "") is None
    (said,) = (line for line in study.missing() if "asked in 2 ways" in line)
    assert '"Q. {content}' in said
    assert '"Question: {content}' in said


def test_a_converted_model_is_not_asked_before_somebody_says_how(
    capsys: pytest.CaptureFixture[str],
) -> None:
    without = Path("without.toml")
    text, cut = TEMPLATE.subn("", SUITES.read_text())
    assert cut == 1
    without.write_text(text)
    assert main(["evaluate", "runs/base", "--config", str(without)]) == 2
    said = capsys.readouterr().err
    assert "runs/base has no [template], in which suite 'mine' asks its questions" in said
    assert r'into without.toml write [template] with, for example, user = "Question: ' in said
    as_they_stand = without.read_text().replace("[[suites]]", "[[suites]]\ntemplated = false")
    without.write_text(as_they_stand.replace('name = "mine"', 'name = "raw"'))
    assert main(["evaluate", "runs/base", "--config", str(without)]) == 0
    path = Path("runs/base/evaluations/iter_00000000.raw.json")
    assert json.loads(path.read_text())["settings"]["template"] is None

    recipe = Path("recipe.toml")
    recipe.write_text(TEMPLATE.sub("", Path("data/mine/sft_then_rl.toml").read_text()))
    assert main(["branch", "runs/base", str(recipe), "--out", "runs/none"]) == 2
    assert "recipe.toml: template is missing, and what objective 'sft' reads is written" in (
        capsys.readouterr().err
    )
    assert not Path("runs/none").exists()


def test_generate_asks_in_a_template_or_says_the_prompt_as_it_stands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["generate", "runs/base", "--prompt", "3 and 1 ?", "--max-new-tokens", "4"]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "runs/base has no [template]" in said
    shown = re.search(r"--set '(template\.user=\S.*)'$", said.strip())
    assert shown is not None
    templated = [*words, "--set", shown[1], "--logprobs"]
    assert main(templated) == 0
    asked = capsys.readouterr().out
    written = ["--prompt", "Question: 3 and 1 ?\nAnswer:", "--max-new-tokens", "4", "--raw"]
    assert main(["generate", "runs/base", *written, "--logprobs"]) == 0
    assert capsys.readouterr().out == asked
    assert main([*words, "--raw", "--logprobs"]) == 0
    assert capsys.readouterr().out != asked
