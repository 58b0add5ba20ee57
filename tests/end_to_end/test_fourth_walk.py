"""The walk done a fourth time: pre-training of one's own that goes on, folders that were moved,
files that are not there or were rewritten, code of one's own in every place that takes it."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import megarlx
from megarlx import plug
from megarlx.cli import main
from megarlx.config import ConfigError
from megarlx.config.evaluation import SuiteConfig
from megarlx.data.chat_template import ChatTemplate
from megarlx.data.conversations import Conversation, ConversationError, turns_of
from megarlx.data.documents import BadLineError
from megarlx.data.tokenizer import ByteTokenizer
from megarlx.evaluation import capability

PRETRAINING = """
[model]
family = "models.py:narrow"
vocab_size = 260
hidden_size = 16
layers = 1
heads = 2
intermediate_size = 24
max_sequence_length = 64
[training]
steps = 6
sequences_per_step = 2
sequence_length = 32
[optimizer]
lr = 1e-2
schedule = "wsd"
decay_steps = 3
final_lr_fraction = 0.0
[data]
tokenizer = "bytes"
sources = [{ name = "texts", prefix = "data/texts" }]
[template]
user = "{content}"
[checkpoints]
save_every_steps = 2
"""
RECIPE = """
[rl]
prompts = "data/asked.jsonl"
prompts_per_step = 2
samples_per_prompt = 2
tokens_per_microbatch = 128
max_completion_tokens = 4
rewards = [{ function = "rewards.py:short", workers = 0 }]
[[stages]]
steps = 2
objectives = { rl = { lr = 1e-3 } }
[logging]
log_every_steps = 1
[evaluation]
at_end = true
readiness_prompts = 0
[[evaluation.suites]]
name = "asked"
kind = "pass_at_k"
path = "data/asked.jsonl"
samples = 2
max_new_tokens = 4
rewards = [{ function = "rewards.py:short", workers = 0 }]
[[evaluation.suites]]
name = "texts"
kind = "perplexity"
path = "data/texts.jsonl"
"""
LONGER = """
[[stages]]
steps = 3
objectives = { pretraining = { inherit = true } }
[logging]
log_every_steps = 1
"""
TRUST = ["--trust", "models.py:narrow"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fourth") / "work"
    (folder / "data").mkdir(parents=True)
    texts = [{"text": f"{n} and {n} are {2 * n} ." * 3} for n in range(40)]
    asked = [{"question": f"{n} and {n}", "answer": str(2 * n)} for n in range(4)]
    for name, rows in (("texts", texts), ("asked", asked)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / f"{name}.jsonl").write_text(lines)
    (folder / "rewards.py").write_text("def short(samples):\n    return [0.0 for _ in samples]\n")
    family = 'from megarlx.config.families import Family\n\nnarrow = Family({"qk_norm": "full"})\n'
    (folder / "models.py").write_text(family)
    for name, text in (("trunk", PRETRAINING), ("rl", RECIPE), ("longer", LONGER)):
        (folder / f"{name}.toml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def trunk(folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ["prepare", "data/texts.jsonl", "--tokenizer", "bytes", "--out", "data/texts"]
        assert main([*words, "--quiet"]) == 0
        assert main(["train", "trunk.toml", "--out", "runs/trunk"]) == 0
    return folder


@pytest.fixture(autouse=True)
def inside(trunk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trunk)


def branch(recipe: str, out: str, *sets: str, start: str = "runs/trunk") -> int:
    words = [word for one in sets for word in ("--set", one)]
    return main(["branch", start, recipe, "--out", out, *TRUST, *words])


def logged(run: str, key: str) -> list[float]:
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ('0.path="data/none.jsonl"', "suite asked: path is 'data/none.jsonl': there is no such"),
        ('1.path="data/asked.jsonl"', "asked.jsonl, line 1: has the text None; expected some"),
        ("0.max_new_tokens=64", "suite asked: a prompt has 7 tokens and max_new_tokens is 64"),
        ('0.rewards.0.function="mine.py:short"', "rewards[0].function is 'mine.py:short': there"),
        ('0={name="q",kind="pass_at_k",path="data/asked.jsonl",few_shot_trained=9,'
         'few_shot_path="data/asked.jsonl",samples=2}', "holds 0 examples beside questions of the"),
    ],
    ids=["no file", "another file", "no room", "no reward", "no examples"],
)  # fmt: skip
def test_a_suite_that_cannot_be_asked_is_told_before_anything_is_trained(
    setting: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert branch("rl.toml", "runs/never", f"evaluation.suites.{setting}") == 1
    assert said in capsys.readouterr().err
    assert not Path("runs/never").exists()


def test_an_excursion_goes_on_where_its_folders_have_been_moved(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert branch("rl.toml", "here/rl", "logging.stop_after_minutes=1e-9") == 75
    Path("there").mkdir()
    shutil.move("here/rl", "there/rl")
    shutil.copytree("runs/trunk", "there/trunk")
    assert branch("rl.toml", "there/rl", start="there/trunk@4") == 1
    assert "choose another --out" in capsys.readouterr().err
    assert branch("rl.toml", "there/rl", start="there/trunk") == 0
    lineage = json.loads(Path("there/rl/lineage.json").read_text())
    assert lineage["parent"]["run"] == str(Path("there/trunk").resolve())
    assert lineage["recipe"] == "rl"
    kept = [json.loads(p.read_text()) for p in Path("there/trunk").rglob("references/*.json")]
    assert str(Path("there/rl").resolve()) in str(kept)


def test_all_of_what_a_run_names_next_can_be_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert branch("rl.toml", "runs/rl") == 0
    done = capsys.readouterr().out.splitlines()[-1]
    evaluate, again, _ = done.partition("next: ")[2].split(", ")
    assert "--trust models.py:narrow" in again
    assert main(evaluate.split()[1:]) == 0
    assert branch("longer.toml", "runs/no_suites") == 0
    done = capsys.readouterr().out.splitlines()[-1]
    assert "--config SUITES.toml --trust models.py:narrow," in done


def test_answers_are_scored_again_where_their_reward_was_rewritten(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Path("suites.toml").write_text(
        RECIPE[RECIPE.index("[[evaluation.suites]]") :]
        .replace("evaluation.suites", "suites")
        .replace("rewards.py", "own.py")
    )
    words = ["evaluate", "runs/trunk", "--config", "suites.toml", *TRUST, "--trust", "own.py:short"]
    for value, said in ((0, "pass@1 0.000"), (0, "there already"), (1, "pass@1 1.000")):
        code = f"def short(samples):\n    return [{value}.0 for _ in samples]\n"
        Path("own.py").write_text(code)
        forget_the_files()
        assert main(words) == 0
        assert f"asked: {said}" in capsys.readouterr().out.replace("pass_at_1", "pass@1")


def forget_the_files() -> None:
    """Another process would read them anew."""
    plug._of_file.cache_clear()


def test_a_course_that_ended_at_the_rate_0_is_told_and_can_be_made_longer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert branch("longer.toml", "runs/still") == 0
    said = capsys.readouterr().out
    assert "pretraining goes on at the learning rate 0, in which its course of 6 steps" in said
    assert set(logged("runs/still", "lr/pretraining")) == {0.0}
    longer = "stages.0.objectives.pretraining.schedule_steps=9"
    assert branch("longer.toml", "runs/longer", longer) == 0
    assert "learning rate 0" not in capsys.readouterr().out
    assert logged("runs/longer", "lr/pretraining") == pytest.approx([1e-2, 5e-3, 0])


def test_another_schedule_takes_over_no_steps_of_decay(tmp_path: Path) -> None:
    linear = 'stages.0.objectives.pretraining={inherit=true,schedule="linear",schedule_steps=9}'
    assert branch("longer.toml", "runs/linear", linear) == 0
    assert logged("runs/linear", "lr/pretraining") == pytest.approx([2.5e-3, 1.25e-3, 0])
    stages = [{"steps": 2, "objectives": {"pretraining": {"schedule": "constant"}}}]
    config = {"optimizer": {"schedule": "wsd", "decay_steps": 1}, "stages": stages}
    Path("own.json").write_text(json.dumps(config))
    given = json.loads(Path("runs/trunk/resolved.json").read_text())
    given |= config | {"training": given["training"] | {"steps": None}}
    Path("own.json").write_text(json.dumps(given))
    assert megarlx.load_config("own.json").stages[0].objectives["pretraining"].decay_steps is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lr": -1}, "learner: lr is -1; expected a number of at least 0"),
        ({"lr": "1e-3"}, 'learner: lr is "1e-3"'),
        ({"lr": 1e-3, "policy": {"preset": "gigpo"}}, "policy.advantage is 'gigpo'; it needs"),
        ({"lr": 1e-3, "temperature": 0}, "learner: temperature is 0; expected a number above 0"),
    ],
)
def test_a_learner_is_refused_what_a_configuration_would_be(
    given: dict[str, Any], said: str
) -> None:
    trusted = ["models.py:narrow"]
    with megarlx.open("runs/trunk", trusted=trusted) as run, pytest.raises(ConfigError) as raised:
        run.learner(**given)
    assert said in str(raised.value)


def test_nothing_is_measured_that_cannot_be_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    measured = "megarlx.evaluation.kinds.perplexity"
    monkeypatch.setattr(measured, lambda *_: pytest.fail("it is measured"))
    Path("texts.toml").write_text(
        '[[suites]]\nname="u"\nkind="perplexity"\npath="data/texts.jsonl"'
    )
    assert main(["evaluate", "runs/trunk", "--config", "texts.toml", *TRUST]) == 1
    assert "results are written there, and it cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("raw", [False, True])
def test_a_question_that_is_no_text_is_refused(
    raw: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a terminal in Latin-1 gives it."""
    typed = ["generate", "runs/trunk", *TRUST, "--prompt", "caf\udce9", *(["--raw"] if raw else [])]
    assert main(typed) == 1
    monkeypatch.setattr("sys.stdin", io.StringIO("caf\udce9\n"))
    assert main(["chat", "runs/trunk", *TRUST, *(["--raw"] if raw else [])]) == 1
    assert capsys.readouterr().err.count("holds half a surrogate pair") == 2


def test_an_empty_choice_is_named_with_its_line() -> None:
    Path("choices.jsonl").write_text('{"context": "a", "choices": ["b", ""], "answer": 0}\n')
    suite = SuiteConfig(name="c", kind="choice", path="choices.jsonl")
    with pytest.raises(BadLineError, match=r"choices\.jsonl, line 1: .* texts that are not empty"):
        capability.tests_of(suite, None)


def test_an_opened_run_is_shown_in_a_line() -> None:
    with megarlx.open("runs/trunk", trusted=["models.py:narrow"]) as run:
        assert repr(run) == "OpenedRun('runs/trunk' at step 6: models.py:narrow)"


@pytest.mark.parametrize("knows", [False, True])
def test_a_call_that_the_chat_template_does_not_write_is_not_learned_as_silence(
    knows: bool,
) -> None:
    call = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}" if knows else ""
    chat = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
    chat += f"{{{{ m.content }}}}{call}{{{{ eos_token }}}}{{% endif %}}{{% endfor %}}"
    template = ChatTemplate(chat)
    called = {"type": "function", "function": {"name": "end", "arguments": {}}}
    says = {"role": "assistant", "content": None, "tool_calls": [called]}
    turns = turns_of([{"role": "user", "content": "?"}, says])
    tokenizer = ByteTokenizer()
    if not knows:
        with pytest.raises(ConversationError, match="it does not write the call of 'end'"):
            template.encode(Conversation(tuple(turns)), tokenizer)
        return
    ids, _ = template.encode(Conversation(tuple(turns)), tokenizer)
    assert tokenizer.decode(ids[:-1]) == "?end"
