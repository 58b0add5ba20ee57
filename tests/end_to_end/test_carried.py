"""What RL leaves, carried on: a bank and who reads it, modes, teachers, protected weights."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_branch_command import TRUNK, branch
from training_runs import launcher, run, tensors, train

from megarlx.checkpoint import read_manifest
from megarlx.cli import main
from megarlx.training.metrics import read_metrics

EARLY = """
[templates.quick]
user = "<reserved_0> question : {content} answer :"
[rl]
template = "quick"
draw = "difficulty"
prompts_per_step = 2
samples_per_prompt = 4
max_completion_tokens = 8
rewards = [{ function = "length_penalty", options = { max_tokens = 8 }, workers = 0 }]
[rl.bank]
[[stages]]
steps = 4
[stages.objectives.rl]
lr = 1e-3
"""
LATER = """
[templates.quick]
user = "<reserved_0> question : {{content}} answer :"
[[data.sources]]
name = "own"
rollouts = "{early}@3"
filter = {{ min_reward = -1.0, per_question = 8 }}
[[data.composition]]
from_tokens = 0
weights = {{ facts = 0.38, problems = 0.52, stories = 0.1 }}
[[data.composition]]
from_tokens = 4096
weights = {{ facts = 0.38, problems = 0.52, stories = 0.1, own = 0.3 }}
[sft]
conversations = "rollouts:{early}"
template = "quick"
filter = {{ min_reward = -1.0 }}
[objectives.teach.distill]
teachers = ["{early}@4"]
prompts_per_rollout = 2
samples_per_prompt = 2
rollout_every_steps = 3
max_completion_tokens = 8
[[stages]]
steps = 6
combine = "average"
sync_every = 2
outer = {{ momentum = 0.5, rate = 0.8 }}
[stages.objectives.pretraining]
inherit = true
protect = {{ run = "{early}@4", share = 0.2 }}
[stages.objectives.sft]
lr = 1e-4
weight = {{ first = 0.2 }}
[stages.objectives.teach]
lr = 1e-4
weight = {{ first = 0.1 }}
[[evaluation.suites]]
name = "quick"
kind = "pass_at_k"
made = "problems"
template = "quick"
questions = 2
samples = 2
max_new_tokens = 4
"""

OWN = """
[sft]
conversations = "rollouts:{early}"
filter = {{ min_reward = -1.0 }}
[[stages]]
steps = 1
[stages.objectives.sft]
lr = 1e-4
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trunk, early RL from its middle, and what goes on from its end."""
    folder = tmp_path_factory.mktemp("carried")
    (folder / "trunk.toml").write_text(TRUNK.format(world=folder / "world"))
    assert train(folder / "trunk.toml", folder / "trunk") == 0
    (folder / "early.toml").write_text(EARLY)
    assert branch(f"{folder}/trunk@4", folder / "early.toml", folder / "early") == 0
    (folder / "later.toml").write_text(LATER.format(early=folder / "early"))
    assert branch(f"{folder}/trunk@8", folder / "later.toml", folder / "later", SAVED) == 0
    return folder


SAVED = "checkpoints.save_every_steps=2"


def lines(runs: Path) -> list[dict[str, Any]]:
    shards = sorted((runs / "early" / "rollouts" / "rl").iterdir())
    assert [path.name for path in shards] == [f"step_{step:08d}.jsonl.gz" for step in range(4)]
    held = [gzip.decompress(path.read_bytes()).decode() for path in shards]
    return [json.loads(line) for text in held for line in text.splitlines()]


def test_a_bank_feeds_pre_training_and_sft_of_a_later_run(runs: Path) -> None:
    kept = lines(runs)
    assert len(kept) == 4 * 2 * 4
    assert list(kept[0]["rewards"]) == ["length_penalty"]
    metrics = read_metrics(runs / "later" / "metrics.jsonl")
    last = {key: value for line in metrics for key, value in line.items()}
    for key in ("loss/pretraining", "loss/sft", "loss/teach", "distill/teach/kl"):
        assert last[key] > 0, key
    state = read_manifest(runs / "later" / "checkpoints" / "iter_00000006").state
    assert "own" in json.dumps(state["objectives"]["pretraining"])


def test_rollouts_that_no_sequence_holds_are_left_out_and_told_of(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "own.toml"
    recipe.write_text(OWN.format(early=runs / "early"))
    given = f"{runs}/trunk@8", recipe
    with pytest.warns(UserWarning, match=r"sft.conversations: \d+ of \d+ have more than 25 tokens"):
        assert branch(*given, tmp_path / "a", "sft.sequence_length=24") == 0
    stops = ("sft.sequence_length=24", 'sft.too_long="stop"')
    assert branch(*given, tmp_path / "b", *stops) != 0
    assert "sft.too_long = 'skip' leaves such conversations out" in capsys.readouterr().err


def test_two_processes_say_once_what_both_find(runs: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "own.toml"
    recipe.write_text(OWN.format(early=runs / "early"))
    words = ["branch", f"{runs}/trunk@8", str(recipe), "--out", str(tmp_path / "two")]
    done = run(
        [*launcher(2), *words, "--set", "sft.sequence_length=24", "--set", "layout.tensor=2"]
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("have more than 25 tokens and are left out") == 1, done.stderr


def test_a_run_with_all_of_it_goes_on_to_the_same_bits(runs: Path, tmp_path: Path) -> None:
    """From the checkpoint in its middle, in another folder, which a kill has left."""
    out = tmp_path / "again"
    assert branch(f"{runs}/trunk@8", runs / "later.toml", out, SAVED) == 0
    for path in ("iter_00000004", "iter_00000006"):
        found = out / "checkpoints" / path
        for file in sorted(found.iterdir(), reverse=True):
            file.unlink()
        found.rmdir()
    before = tensors(runs / "later", 6)
    assert branch(f"{runs}/trunk@8", runs / "later.toml", out, SAVED) == 0
    assert tensors(out, 6) == before


def test_a_template_is_named_where_text_is_asked_for(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(runs / "later")
    told = ["generate", run, "--prompt", "how many ?", "--max-new-tokens", "3"]
    assert main([*told, "--template", "quick"]) == 0
    in_mode = capsys.readouterr().out
    assert main(told) == 0
    assert capsys.readouterr().out != in_mode
    assert main([*told, "--template", "slow"]) == 1
    known = "--template is 'slow'; allowed are the names in [templates]: quick"
    assert known in capsys.readouterr().err
    assert main([*told, "--template", "quick", "--raw"]) == 1
    assert main(["evaluate", run, "--suite", "quick"]) == 0
    (result,) = (runs / "later").rglob("*quick.json")
    assert json.loads(result.read_text())["settings"]["template"]["user"].startswith("<reserved_0>")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("early@4", "trunk@4"), r"'.*trunk@4', whose lineage.json has no parent; allowed is an"),
        (("@3", "@0"), r"of 0 rollouts of its first 0 steps nothing is left: none was there"),
        (("rollouts:{early}", "rollouts:{trunk}"), r"trunk keeps no rollouts: .* \[rl.bank\]"),
        (("<reserved_0>", "<reserved_7>"), r"writes <reserved_7>; the model has <reserved_0>, "),
    ],
    ids=["no parent", "no rollouts", "no bank", "no token"],
)
def test_what_cannot_be_carried_is_refused_before_the_first_step(
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changed: tuple[str, str],
    said: str,
) -> None:
    text = LATER.format(early=runs / "early")
    old, new = (part.format(early=runs / "early", trunk=runs / "trunk") for part in changed)
    assert old in text
    (tmp_path / "recipe.toml").write_text(text.replace(old, new))
    assert branch(f"{runs}/trunk@8", tmp_path / "recipe.toml", tmp_path / "x") == 1
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "x").exists()


def test_a_teacher_of_another_tokenizer_or_shape_is_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = tmp_path / "teacher"
    saved = json.loads((runs / "early" / "resolved.json").read_text())
    tokenizer = json.loads((runs / "early" / "tokenizer.json").read_text())
    for what in ("tokenizer", "vocabulary"):
        teacher.mkdir(exist_ok=True)
        if not (teacher / "checkpoints").exists():
            (teacher / "checkpoints").symlink_to(runs / "early" / "checkpoints")
        if what == "vocabulary":
            saved["model"]["vocab_size"] = 512
        else:
            words = tokenizer["definition"]["words"]
            words[0], words[1] = words[1], words[0]
            from megarlx.data.tokenizer import WordTokenizer

            WordTokenizer(words).save(teacher / "tokenizer.json")
        (teacher / "resolved.json").write_text(json.dumps(saved))
        text = LATER.format(early=runs / "early")
        text = text.replace(f'teachers = ["{runs}/early@4"]', f'teachers = ["{teacher}@4"]')
        (tmp_path / "recipe.toml").write_text(text)
        assert branch(f"{runs}/trunk@8", tmp_path / "recipe.toml", tmp_path / "x") == 1
        said = {
            "tokenizer": "has the tokenizer 'words'",
            "vocabulary": "has model.vocab_size = 512; allowed is this model's, 400",
        }[what]
        assert f"objectives.teach.distill.teachers: {teacher}@4 {said}" in capsys.readouterr().err
