"""The first hour with a model of one's own: what a user does, in order, and what is done wrong.

The model is one that nobody has seen: random weights, a tokenizer and a chat template made here.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Engine
from training_runs import run

import megarlx
from megarlx.cli import main
from megarlx.report.figures import gains
from megarlx.report.study import Study

transformers = pytest.importorskip("transformers")

CHAT = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}: {{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}{{ call['function']['name'] }}{% endfor %}"
    "<|done|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"
)
SUITES = """
[[suites]]
name = "sums"
kind = "pass_at_k"
path = "data/test.jsonl"
samples = 4
max_new_tokens = 8
rewards = [{ function = "data/reward.py:even" }]
"""
TRAINING = """
[training]
sequence_length = 96
sequences_per_step = 4
sequences_per_microbatch = 2
[checkpoints]
[evaluation]
at_end = true
"""
RL = (
    TRAINING
    + SUITES.replace("[[suites]]", "[[evaluation.suites]]")
    + """
[rl]
prompts = "data/questions.jsonl"
prompts_per_step = 2
samples_per_prompt = 4
max_completion_tokens = 8
tokens_per_microbatch = 256
policy.preset = "dr_grpo"
[[rl.rewards]]
function = "data/reward.py:even"
[[stages]]
steps = 2
[stages.objectives.rl]
lr = 0.0
warmup_steps = 0
"""
)
SFT = (
    TRAINING
    + """
[sft]
conversations = "data/conversations.jsonl"
demonstrations = "all"
[[stages]]
steps = 2
[stages.objectives.sft]
lr = 1e-3
warmup_steps = 0
"""
)
CPT = (
    TRAINING
    + """
[data]
sources = [{ name = "mine", prefix = "data/mine" }]
[[stages]]
steps = 2
[stages.objectives.pretraining]
lr = 1e-3
warmup_steps = 0
"""
)
ROOMS = (
    TRAINING
    + """
[[evaluation.suites]]
name = "rooms"
kind = "agent"
path = "data/rooms.jsonl"
samples = 2
[evaluation.suites.environment]
function = "data/rooms.py:Rooms"
max_turns = 2
max_turn_tokens = 6
max_episode_tokens = 128
[rl]
prompts = "data/rooms.jsonl"
prompts_per_step = 2
samples_per_prompt = 2
tokens_per_microbatch = 256
keep_samples_every_steps = 1
policy.preset = "sampo"
[rl.environment]
function = "data/rooms.py:Rooms"
max_turns = 2
max_turn_tokens = 6
max_episode_tokens = 128
[[stages]]
steps = 2
[stages.objectives.rl]
lr = 1e-4
warmup_steps = 0
"""
)
# What an action calls is answered by a turn of the role tool.
ROOMS_CODE = """
class Rooms:
    def reset(self, task, seed):
        self.left = 2
        return f"go to {task['goal']}"

    def step(self, action):
        self.left -= 1
        return "a wall", len(action) / 10, self.left == 0, {"role": "tool"}
"""
# Text of a model that knows nothing gets it half of the time.
REWARD = """
def even(samples):
    return [float(len(sample.completion) % 2 == 0) for sample in samples]
"""


def own_model(folder: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    engine = Engine(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([AddedToken(t, special=True) for t in ("<|turn|>", "<|done|>")])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=engine, eos_token="<|done|>")
    tokenizer.chat_template = CHAT
    config = transformers.Qwen3Config(
        vocab_size=260,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=257,
        bos_token_id=None,
    )
    transformers.set_seed(5)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def lines(path: Path, *values: dict) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    data = folder / "data"
    data.mkdir()
    own_model(folder / "models" / "own")
    questions = [f"What is {n} and one, said without any doubt at all?" for n in range(6)]
    lines(
        data / "test.jsonl", *({"question": q, "answer": str(n)} for n, q in enumerate(questions))
    )
    lines(data / "questions.jsonl", *({"question": f"{n} + 1?", "answer": "1"} for n in range(4)))
    lines(data / "texts.jsonl", *({"text": q} for q in [*questions[:2], "nothing of the kind"] * 9))
    call = {"function": {"name": "add", "arguments": {"x": 1}}}
    lines(
        data / "conversations.jsonl",
        {"prompt": "1 + 1?", "completion": "2"},
        {"text": "a text alone"},
        {"messages": [
            {"role": "user", "content": "2 + 1?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "3"},
        ]},
    )  # fmt: skip
    (data / "reward.py").write_text(REWARD)
    (data / "rooms.py").write_text(ROOMS_CODE)
    lines(data / "rooms.jsonl", *({"goal": goal} for goal in range(3)))
    texts = {"suites": SUITES, "rl": RL, "sft": SFT, "cpt": CPT, "rooms": ROOMS}
    for name, text in texts.items():
        (data / f"{name}.toml").write_text(text)
    return folder


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def converted() -> Path:
    (found,) = (p for p in Path("runs/converted").iterdir() if not p.name.startswith("."))
    return found


def test_a_model_is_asked_and_measured_as_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "models/own", "--prompt", "1 + 1?", "--max-new-tokens", "4"]
    assert main([*words, "--temperature", "0"]) == 0
    first = capsys.readouterr()
    assert "is a Hugging Face model; it becomes the run runs/converted/own-" in first.err
    assert main([*words, "--temperature", "0"]) == 0
    again = capsys.readouterr()
    assert (again.out, again.err) == (first.out, "")
    assert main(["evaluate", "models/own", "--config", "data/suites.toml"]) == 0
    path = converted() / "evaluations" / "iter_00000000.sums.json"
    result = json.loads(path.read_text())
    assert result["settings"]["template"]["chat"] == CHAT
    assert 0 < result["metrics"]["pass_at_1"] < 1


def test_a_prompt_has_the_ids_that_apply_chat_template_gives() -> None:
    theirs = transformers.AutoTokenizer.from_pretrained("models/own")
    messages = [{"role": "user", "content": "1 + 1?"}]
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    with megarlx.open("models/own") as run:
        sampled = run.sample(["1 + 1?"], max_new_tokens=3, temperature=0)
        model = transformers.AutoModelForCausalLM.from_pretrained("models/own")
        import torch

        given = torch.tensor([wanted])
        greedy = model.generate(given, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert list(sampled.made[0].request.prompt) == wanted
    assert sampled.made[0].tokens.tolist() == greedy[0, len(wanted) :].tolist()


def test_rl_that_trains_nothing_gains_nothing() -> None:
    assert main(["branch", "models/own", "data/rl.toml", "--out", "runs/rl"]) == 0
    assert main(["evaluate", "models/own", "--config", "data/suites.toml"]) == 0
    figure = gains(Study.of(Path("runs")), "")
    assert figure is not None
    _, *rows = figure.table
    assert len(rows) == 1
    assert [cell.split(" ")[0] for cell in rows[0] if "[" in cell] == ["0.0"]


def test_pre_training_goes_on_with_own_texts_and_what_a_test_shares_with_them_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["prepare", "data/texts.jsonl", "--tokenizer", "models/own", "--out", "data/mine"]
    assert main([*words, "--quiet"]) == 0
    assert main(["branch", "models/own", "data/cpt.toml", "--out", "runs/cpt"]) == 0
    assert main(["evaluate", "runs/cpt", "--config", "data/suites.toml"]) == 0
    capsys.readouterr()
    assert main(["inspect", "runs/cpt", "--overlap", "--config", "data/suites.toml"]) == 0
    said = capsys.readouterr().out
    # 13 of these tokens are 13 letters, which all of the questions share with two of the texts.
    assert "sums: 6 questions, 13 tokens in a row" in said
    assert "in mine  6 of 6 (100.0%)" in said
    words = ["inspect", "runs/cpt", "--overlap", "--config", "data/suites.toml"]
    assert main([*words, "--run-tokens", "45"]) == 0
    said = capsys.readouterr().out
    assert "in mine  2 of 6 (33.3%)" in said
    assert "pass@1 at iteration 2: found" in said


def test_conversations_with_tools_and_texts_are_learned_and_go_back(folder: Path) -> None:
    assert main(["branch", "models/own", "data/sft.toml", "--out", "runs/sft"]) == 0
    assert main(["convert", "runs/sft", "models/back", "--verify", "--quiet"]) == 0
    theirs = transformers.AutoTokenizer.from_pretrained("models/back")
    assert theirs.chat_template == CHAT
    before, after = (
        dict(transformers.AutoModelForCausalLM.from_pretrained(f"models/{n}").named_parameters())
        for n in ("own", "back")
    )
    assert before.keys() == after.keys()
    assert any(not before[name].equal(after[name]) for name in before)


def test_an_environment_asks_by_itself_and_tools_are_called() -> None:
    """The lines have no question; `tools` itself has tests of its own."""
    assert main(["branch", "models/own", "data/rooms.toml", "--out", "runs/rooms"]) == 0
    result = json.loads(Path("runs/rooms/evaluations/iter_00000002.rooms.json").read_text())
    assert [item["samples"] for item in result["items"]] == [2, 2, 2]
    (first, *_) = sorted(Path("runs/rooms/samples").glob("step_*.rl.jsonl"))
    sample = json.loads(first.read_text().splitlines()[0])
    assert sample["prompt"].startswith("go to ")
    assert "saw: a wall" in sample["completion"]


def test_a_model_that_was_taught_another_template_goes_back_with_that_one() -> None:
    words = ["branch", "models/own", "data/sft.toml", "--out", "runs/taught"]
    frames = ["--set", r'template.user="Q {content}\nA"', "--set", "stages.0.steps=1"]
    assert main([*words, *frames]) == 0
    assert main(["convert", "runs/taught", "models/taught", "--quiet"]) == 0
    theirs = transformers.AutoTokenizer.from_pretrained("models/taught")
    messages = [{"role": "user", "content": "1 + 1?"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == "Q 1 + 1?\nA"


def test_processes_of_one_job_share_a_conversion() -> None:
    words = ["-m", "megarlx", "generate", "models/own", "--prompt", "1 + 1?", "--temperature", "0"]
    alone = run([sys.executable, *words, "--max-new-tokens", "4"])
    shutil.rmtree("runs/converted")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    two = run([*launcher, "--nproc-per-node", "2", *words, "--max-new-tokens", "4"])
    assert two.returncode == 0, two.stderr[-2000:]
    assert two.stdout == alone.stdout
    assert two.stderr.count("is a Hugging Face model; it becomes the run") == 1
    assert converted().is_dir()


def test_code_that_another_run_names_is_not_run_to_look_for_overlaps(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree("runs/cpt", "runs/strange")
    path = Path("runs/strange/resolved.json")
    config = json.loads(path.read_text())
    config["data"] = {**config["data"], "maker": "their_code:Maker", "folder": "x", "sources": []}
    path.write_text(json.dumps(config))
    capsys.readouterr()
    assert main(["inspect", "runs/strange", "--overlap"]) == 2
    assert "allow it with --trust their_code:Maker" in capsys.readouterr().err


def test_a_changed_model_is_another_one(folder: Path) -> None:
    shutil.copytree("models/own", "models/two/own")
    config = Path("models/two/own/generation_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "temperature": 0.5}))
    with megarlx.open("models/two/own") as run:
        assert run.reference.run.parent == Path("runs/converted")
        assert run.reference.run.name.startswith("own-")
        assert run.reference.run.name != converted_name("models/own")


def converted_name(model: str) -> str:
    with megarlx.open(model) as run:
        return run.reference.run.name


def test_the_runs_are_reported_and_a_job_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tree", "runs"]) == 0
    assert "own-" in capsys.readouterr().out
    assert main(["report", "runs"]) == 0
    assert Path("runs/report/index.html").exists()
    assert main(["plan", "data/rl.toml", "--trunk", "models/own", "--gpus", "1"]) == 0
    with megarlx.open("runs/rl") as run:
        page = run.report()
    assert page == Path("runs/report/index.html")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["config", "data/rl.toml"], "is a recipe, whose model is that of the run it starts from"),
        (["branch", "models/non", "data/rl.toml", "--out", "runs/x"], "models/non is not there"),
        (
            ["branch", "models/own", "data/rl.toml", "--out", "runs/x", "--set",
             'rl.prompts="data/nothing.jsonl"'],
            "rl.prompts is 'data/nothing.jsonl': there is no such file",
        ),
        (
            ["branch", "models/own", "data/cpt.toml", "--out", "runs/x", "--set",
             'data.sources=[{ name = "mine", prefix = "data/texts.jsonl" }]'],
            "made by: megarlx prepare data/texts.jsonl",
        ),
        (
            ["branch", "models/own", "data/rl.toml", "--out", "runs/x", "--set",
             "template.bos=1"],
            "template.bos",
        ),
        (["convert", "models/own"], "give either DST or --into RUN"),
        (["inspect", "data", "--overlap"], "data holds no checkpoints"),
        (["train", "--help-config", "nosuchkey"], "no key is called so"),
    ],
)  # fmt: skip
def test_mistakes_are_answered_with_what_can_be_done(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) in (1, 2)
    assert said in capsys.readouterr().err
    assert not Path("runs/x").exists()
