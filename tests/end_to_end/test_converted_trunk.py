"""Public revisions become a trunk; branch, evaluate, generate, sweep, report and export take it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from public_models import tiny_model
from training_runs import ROOT, tool

from megarlx.cli import main

transformers = pytest.importorskip("transformers")

RECIPE = """
[training]
sequence_length = 48
sequences_per_step = 2
sequences_per_microbatch = 1

[template]
user = "Q: {content}\\nA:"

[sft]
conversations = "questions.jsonl"

[rl]
prompts = "questions.jsonl"
prompts_per_step = 2
samples_per_prompt = 2
max_completion_tokens = 6
slots = 4

[[stages]]
steps = 1
combine = "average"
[stages.objectives.rl]
lr = 1e-3
[stages.objectives.sft]
lr = 1e-3

[evaluation]
at_end = true
[[evaluation.suites]]
name = "mine"
kind = "pass_at_k"
path = "questions.jsonl"
samples = 2
max_new_tokens = 4
"""

SUITES = """
[template]
user = "Q: {content}\\nA:"

[[suites]]
name = "mine"
kind = "pass_at_k"
path = "questions.jsonl"
samples = 2
max_new_tokens = 4
few_shot = 1
few_shot_path = "solved.jsonl"
"""

SWEEP = """
out = "runs"
trunk = "runs/trunk"
seeds = [3]
evaluate = ["1000"]
suites = "suites.toml"
[[excursions]]
recipes = ["both.toml"]
checkpoints = ["tokens:3B"]
"""


def convert(*words: object) -> None:
    assert tool("convert_checkpoint").main([*map(str, words), "--quiet"]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two revisions, in bf16 as published, as one trunk; data, a recipe, suites."""
    folder = tmp_path_factory.mktemp("public")
    for step, tokens in ((1000, "2B"), (2000, "4B")):
        source = folder / f"step{step}"
        tiny_model(source, seed=step, bf16=True)
        place = ("--into", folder / "runs" / "trunk", "--iteration", step, "--tokens", tokens)
        convert("--from", "hf", "--to", "megarlx", source, *place)
    questions = [{"question": f"{n} + 1 ?", "answer": str(n + 1)} for n in range(4)]
    lines = "".join(json.dumps(one) + "\n" for one in questions)
    (folder / "questions.jsonl").write_text(lines)
    (folder / "solved.jsonl").write_text('{"question": "7 + 1 ?", "answer": "8"}\n')
    (folder / "both.toml").write_text(RECIPE)
    (folder / "suites.toml").write_text(SUITES)
    return folder


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return


def test_generate_says_what_transformers_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Of an earlier revision, greedily, through the tokenizer that came with it."""
    words = ["generate", "runs/trunk@1000", "--raw", "--prompt", "seven plus", "--logprobs"]
    assert main([*words, "--temperature", "0", "--max-new-tokens", "8"]) == 0
    ours = [line.split(maxsplit=1)[0] for line in capsys.readouterr().out.splitlines() if line]
    tokenizer = transformers.AutoTokenizer.from_pretrained("step1000")
    model = transformers.AutoModelForCausalLM.from_pretrained("step1000", dtype=torch.float32)
    inputs = tokenizer("seven plus", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        drawn = model.generate(inputs, max_new_tokens=8, do_sample=False)
        logits = model(drawn[:, :-1]).logits[0, inputs.shape[1] - 1 :]
    new = drawn[0, inputs.shape[1] :, None]
    theirs = logits.log_softmax(-1).gather(1, new).squeeze(1).tolist()
    assert [float(value) for value in ours] == pytest.approx(theirs, abs=2e-4)


def test_a_sweep_measures_and_branches_a_trunk_that_was_never_trained_here(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "sweep.toml").write_text(SWEEP)
    assert main(["sweep", "sweep.toml", "--list"]) == 0
    # The commands that it would run, each in a process of its own.
    for line in capsys.readouterr().out.splitlines():
        name, *words = shlex.split(line)
        assert (name, main(words)) == ("megarlx", 0)
    few_shot = json.loads(Path("runs/trunk/evaluations/iter_00001000.mine.json").read_text())
    assert few_shot["trunk_tokens"] == 2_000_000_000
    # A model that was only pre-trained is shown examples.
    assert "few_shot" in str(few_shot["settings"]), few_shot["settings"]
    run = Path("runs/both-at-tokens-3B-seed-3")
    lineage = json.loads((run / "lineage.json").read_text())
    assert (lineage["parent"]["iteration"], lineage["seed"]) == (2000, 3)
    assert lineage["trunk_tokens"] == 4_000_000_000
    result = json.loads((run / "evaluations/iter_00000001.mine.json").read_text())
    assert result["trunk_tokens"] == 4_000_000_000
    assert main(["report", "runs"]) == 0
    assert (folder / "runs/report/index.html").exists()


def test_a_sweep_from_a_run_has_no_trunk_to_set(capsys: pytest.CaptureFixture[str]) -> None:
    Path("wrong.toml").write_text('out = "runs"\ntrunk = "runs/trunk"\n[set]\n"training.steps" = 3')
    assert main(["sweep", "wrong.toml", "--list"]) == 2
    assert "set is for trunks that are trained; runs/trunk is a run" in capsys.readouterr().err


def test_an_excursion_goes_back_to_transformers_with_what_came_with_its_trunk(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["branch", "runs/trunk@1000", "both.toml", "--out", "runs/back"]) == 0
    # A file holds 20 kB: several, and their index.
    words = ("runs/back", "exported", "--verify", "--file-megabytes", "0.02")
    convert("--from", "megarlx", "--to", "hf", *words)
    assert ": good" in capsys.readouterr().out
    index = json.loads(Path("exported/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    tokenizer = transformers.AutoTokenizer.from_pretrained("exported")
    model = transformers.AutoModelForCausalLM.from_pretrained("exported", dtype=torch.float32)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 256
    capsys.readouterr()
    words = ["generate", "runs/back", "--prompt", "3 + 1 ?", "--logprobs", "--temperature", "0"]
    assert main([*words, "--max-new-tokens", "6"]) == 0
    ours = len(capsys.readouterr().out.split("\n")) - 2  # one line a token, and the end
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "3 + 1 ?"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "Q: 3 + 1 ?\nA:"
    inputs = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        drawn = model.generate(inputs, max_new_tokens=6, do_sample=False)
    assert drawn.shape[1] - inputs.shape[1] == ours
