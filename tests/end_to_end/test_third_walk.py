"""The walk done a third time: a tokenizer that writes the first word of a text apart, a template
with tools, thoughts and a date, prompts and answers in other people's forms."""

from __future__ import annotations

import argparse
import errno
import json
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Engine

import megarlx
from megarlx.cli import main
from megarlx.config.objectives import TemplateConfig
from megarlx.data.conversations import Conversation, ConversationError, Frames, Turn, turns_of
from megarlx.data.prompts import read_prompts
from megarlx.data.tokenizer import load_tokenizer
from megarlx.hf.tokenizer_files import chat_template
from megarlx.report.settings import MOST_TOLD
from megarlx.report.study import Study
from megarlx.run import generate_command
from megarlx.run.asked import read_asked
from megarlx.run.directory import RunError
from megarlx.run.overlap import overlaps
from megarlx.run.session import session

transformers = pytest.importorskip("transformers")

SAYS = "<|im_start|>"
ENDS = "<|im_end|>"
# {{ ANSWER }} stands where trainers of transformers mark what an assistant says.
CHAT = (
    "<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}"
    "{% else %}Today is {{ strftime_now('%d %b %Y') }}.{{ pad_token }}{% endif %}<|im_end|>\n"
    "{% for m in messages %}{% if m.role == 'user' or m.role == 'tool' %}"
    "<|im_start|>{{ m.role }}{{ ' ' + m.name if m.name }}\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>"
    "{{ c.function | tojson(sort_keys=true) }}</call>{% endfor %}<|im_end|>{% endgeneration %}"
    "{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"x": 3}}}
USER = {"role": "user", "content": "  what is 重 😀 שלום?\n\nsay  it "}
ANSWERS: list[list[dict[str, Any]]] = [
    [USER, {"role": "assistant", "content": "seven"}],
    [{"role": "system", "content": "Be short."}, USER, {"role": "assistant", "content": " 7"}],
    [USER, {"role": "assistant", "content": "so", "reasoning_content": "hmm "}],
    [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]},
     {"role": "tool", "name": "add", "tool_call_id": "1", "content": "7"},
     {"role": "assistant", "content": "7"}, USER, {"role": "assistant", "content": "again 7"}],
]  # fmt: skip
RECIPE = """
[training]
sequence_length = 160
sequences_per_step = 2
sequences_per_microbatch = 2
[rl]
prompts = "data/prompts.jsonl"
prompts_per_step = 2
samples_per_prompt = 2
tokens_per_microbatch = 512
max_completion_tokens = 4
policy.preset = "dr_grpo"
[[rl.rewards]]
function = "data/tools.py:even"
[[stages]]
steps = 1
[stages.objectives.rl]
lr = 1e-3
[checkpoints]
[evaluation]
readiness_prompts = 0
"""
PLAYED = """
function = "tools"
options = { tools = ["data/tools.py:search"], reward = "data/tools.py:even" }
max_turns = 2
max_turn_tokens = 4
max_episode_tokens = 220
"""
AGENT = (
    RECIPE.replace('[[rl.rewards]]\nfunction = "data/tools.py:even"', "[rl.environment]" + PLAYED)
    .replace("max_completion_tokens = 4\n", "")
    .replace("readiness_prompts = 0", "readiness_prompts = 2\nat_end = true")
    .replace("data/prompts.jsonl", "data/tasks.jsonl")
    .replace("dr_grpo", "sampo")
    + '[[evaluation.suites]]\nname = "tools"\nkind = "agent"\npath = "data/tasks.jsonl"\n'
    + "samples = 2\n[evaluation.suites.environment]"
    + PLAYED
)
CODE = """
def search(query):
    return f"found {query}"

def even(samples):
    return [float(len(sample.completion) % 2 == 0) for sample in samples]
"""


def own_model(folder: Path) -> None:
    """Llama's tokenizer: SentencePiece's pieces, bytes for what none of them is."""
    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"seventwhaisoruyAdgi.?71\n"]
    merges = [("▁", "s"), ("▁s", "e"), ("s", "e"), ("▁", "w"), ("w", "h"), ("▁", "7")]
    vocabulary: dict[str, int] = {}
    for piece in [*words, *(a + b for a, b in merges)]:
        vocabulary.setdefault(piece, len(vocabulary))
    engine = Engine(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    engine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    engine.add_special_tokens(
        [AddedToken("<pad>", special=True, lstrip=True), AddedToken(SAYS, special=True)]
    )
    engine.add_special_tokens([AddedToken(ENDS, special=True, rstrip=False)])
    engine.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "</think>")])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=engine, eos_token=ENDS, pad_token="<pad>"
    )
    tokenizer.chat_template = CHAT
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.set_seed(7)
    model = transformers.LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder, max_shard_size="10KB")
    tokenizer.save_pretrained(folder)


def lines(path: Path, *values: Any) -> None:
    path.write_text("".join(json.dumps(value) + "\r\n\r\n" for value in values))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("third") / "my work"
    data = folder / "data"
    data.mkdir(parents=True)
    own_model(folder / "models" / "own")
    asked = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "1 + 1?"}]
    lines(data / "prompts.jsonl", {"prompt": asked, "answer": 2}, {"prompt": "2?", "answer": "2"})
    lines(data / "tasks.jsonl", *({"question": f"{n}?", "answer": n} for n in range(2)))
    (data / "tools.py").write_text(CODE)
    (data / "rl.toml").write_text(RECIPE)
    (data / "agent.toml").write_text(AGENT)
    return folder


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.mark.parametrize("messages", ANSWERS, ids=["plain", "system", "thoughts", "tools"])
def test_conversations_have_the_ids_and_the_mask_of_transformers(
    messages: list[dict[str, Any]],
) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained("models/own")
    wanted = theirs.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    asked = messages[:-1]
    prompt = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    with megarlx.open("models/own") as run:
        assert run.template is not None
        ids, learned = run.template.encode(Conversation(tuple(turns_of(messages))), run.tokenizer)
        assert run.prompt_ids(asked) == prompt
    assert (ids, [int(says) for says in learned]) == (
        wanted["input_ids"],
        wanted["assistant_masks"],
    )


def test_a_frame_in_the_middle_of_a_prompt_is_written_as_its_export_writes_it() -> None:
    """What an export's chat template writes in one piece, a run has learned in several."""
    tokenizer = load_tokenizer("models/own")
    turns = [Turn("user", "what"), Turn("assistant", "seven"), Turn("user", "is it")]
    frames = Frames(
        f"{SAYS}user\n{{content}}{ENDS}\n", opening=f"{SAYS}assistant\n", assistant="{content}"
    )
    ids = frames.prompt_ids(turns, tokenizer)
    opening = f"{SAYS}assistant\n"
    said = f"{SAYS}user\nwhat{ENDS}\n{opening}seven{ENDS}{SAYS}user\nis it{ENDS}\n{opening}"
    assert ids == tokenizer.encode(said, specials=True)
    begun = frames.prompt_ids(turns[:1], tokenizer)
    answer = [*tokenizer.encode("seven", inside=True), tokenizer.eos_id]
    assert begun + answer + frames.prompt_ids(turns[2:], tokenizer, follows=True) == ids


FRAMED = [  # between whose parts no pieces are joined
    Frames("what {content}\n", assistant=" {content}"),
    Frames("{content}\n", system="is {content}.\n", opening="so\n", assistant="{content}"),
    Frames(f"{SAYS}what\n{{content}}\n", assistant="{content}"),
]


@pytest.mark.parametrize("frames", FRAMED, ids=["words", "nothing", "a token"])
@pytest.mark.parametrize("begins", [False, True])
def test_an_export_begins_as_what_was_trained(frames: Frames, begins: bool, tmp_path: Path) -> None:
    """Behind a first token no space stands by itself, as it does before a text."""
    engine = Engine.from_file("models/own/tokenizer.json")
    if begins:
        engine.post_processor = processors.TemplateProcessing(
            single="<pad> $A", special_tokens=[("<pad>", engine.token_to_id("<pad>"))]
        )
    engine.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path, eos=ENDS)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=engine, eos_token=ENDS)
    theirs.chat_template = chat_template(TemplateConfig(**frames.described), ours)
    for first in ("what", " is", ""):
        turns = [Turn("user", first), Turn("assistant", "seven"), Turn("user", "why")]
        for asked in (turns, [Turn("system", "it"), *turns]):
            messages = [{"role": turn.role, "content": turn.content} for turn in asked]
            wanted = theirs.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
            assert frames.prompt_ids(asked, ours) == wanted


def test_a_template_that_asks_for_the_day_is_told_that_of_the_conversion() -> None:
    with megarlx.open("models/own") as run:
        assert run.config.template is not None
        assert run.config.template.date == date.today().isoformat()
        assert run.config.template.tokens == {"pad_token": "<pad>"}
        assert run.template is not None
        assert run.template.described == {
            "chat": CHAT,
            "bos": "",
            "pad_token": "<pad>",
            "date": date.today().isoformat(),
        }


OPENED = CHAT.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")


def test_a_template_that_opens_the_thoughts_can_be_asked_in(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree("models/own", "models/opened")
    Path("models/opened/chat_template.jinja").write_text(OPENED)
    theirs = transformers.AutoTokenizer.from_pretrained("models/opened")
    wanted = theirs.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    with megarlx.open("models/opened") as run:
        assert run.prompt_ids([USER]) == wanted
        assert run.template is not None
        with pytest.raises(ConversationError, match="does not write the answer that it asks for"):
            run.template.encode(Conversation(tuple(turns_of(ANSWERS[0]))), run.tokenizer)
    assert "it can be asked, and not be taught, in its chat template" in capsys.readouterr().err


def test_thoughts_are_not_left_out_of_frames_in_silence() -> None:
    tokenizer = load_tokenizer("models/own")
    with pytest.raises(ConversationError, match="a message has reasoning_content"):
        Frames("{content}").encode(Conversation(tuple(turns_of(ANSWERS[2]))), tokenizer)


def test_questions_behind_a_systems_turn_are_asked_so_by_rl_and_by_a_suite() -> None:
    theirs = transformers.AutoTokenizer.from_pretrained("models/own")
    wanted = [
        len(theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False))
        for asked in (
            json.loads(Path("data/prompts.jsonl").read_text().splitlines()[0])["prompt"],
            [{"role": "user", "content": "2?"}],
        )
    ]
    assert main(["branch", "models/own", "data/rl.toml", "--out", "runs/rl"]) == 0
    rows = [json.loads(line) for line in Path("runs/rl/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["rl/prompt_tokens"] == sum(wanted)
    assert [prompt.answer for prompt in read_prompts("data/prompts.jsonl")] == ["2", "2"]


def test_a_run_from_before_a_key_was_there_goes_on_where_nobody_sets_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["branch", "models/own", "data/rl.toml", "--out", "runs/older"]
    assert main(words) == 0
    path = Path("runs/older/resolved.json")
    saved = json.loads(path.read_text())
    for one in (saved["rl"], saved["stages"][0]["objectives"]["rl"], saved["templates"]["model"]):
        assert one.pop("draw" if "draw" in one else "eps" if "eps" in one else "system")
    path.write_text(json.dumps(saved))
    capsys.readouterr()
    assert main([*words, "--set", 'rl.draw="difficulty"']) == 1
    assert 'rl.draw: was null, is "difficulty"' in capsys.readouterr().err
    assert main(words) == 0


def test_tools_are_played_probed_and_measured() -> None:
    assert main(["branch", "models/own", "data/agent.toml", "--out", "runs/agent"]) == 0
    names = {path.name for path in Path("runs/agent/evaluations").iterdir()}
    assert names == {"iter_00000000.rl-readiness.json", "iter_00000001.tools.json"}


def test_messages_of_a_file_keep_their_calls_and_a_flat_list_is_told_apart() -> None:
    asked = ANSWERS[3][:3]
    lines(Path("data/ask.jsonl"), {"messages": asked})
    assert list(read_asked("data/ask.jsonl")) == [asked]
    with megarlx.open("models/own") as run, pytest.raises(RunError, match="give \\[messages\\]"):
        run.generate(asked)


def test_answers_are_as_long_as_the_model_has_room_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By default they are longer than this model's longest sequence."""
    lines(Path("data/room.jsonl"), "1?", {"question": "what is the other way to say so?"}, "2?")
    words = ["chat", "models/own", "--prompts", "data/room.jsonl", "--temperature", "0"]
    assert main(words) == 0
    asked = [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()]
    assert asked == ["1?", "what is the other way to say so?", "2?"]


def broken(*_: object, **__: object) -> int:
    raise BrokenPipeError


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_reader_that_has_gone_is_no_error_and_a_full_disk_says_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megarlx.run.generate_command._generate", broken)
    arguments = argparse.ArgumentParser()
    generate_command.add_arguments(arguments)
    with pytest.raises(BrokenPipeError):
        generate_command.run(arguments.parse_args(["models/own", "--prompt", "x"]))
    with megarlx.open("models/own") as run:
        config = run.config
    with pytest.raises(BrokenPipeError):
        session("branch", config, broken)
    capsys.readouterr()
    assert session("branch", config, full) == 1
    assert "checkpoints that are there are whole" in capsys.readouterr().err


def test_a_bad_line_can_be_skipped_by_the_command_that_met_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines(Path("data/a.jsonl"), {"text": "a"})
    lines(Path("data/b.jsonl"), {"txt": "b"}, {"text": "c"})
    words = ["prepare", "data/a.jsonl", "data/b.jsonl", "--tokenizer", "models/own"]
    words += ["--out", "data/mine", "--quiet"]
    assert main(words) == 1
    assert main([*words, "--on-bad-line", "skip"]) == 0
    assert '"documents": 2' in capsys.readouterr().out


def test_runs_that_differ_in_many_settings_are_told_apart_by_their_names() -> None:
    sets = {"a": (), "b": ("rl.top_p=0.9", "rl.temperature=0.5", "rl.prompts_per_step=1",
                           "rl.samples_per_prompt=4", "rl.max_completion_tokens=5")}  # fmt: skip
    assert len(sets["b"]) > MOST_TOLD
    recipe = Path("data/rl.toml").read_text() + "at_end = true\n"
    recipe += SUITE.replace("[[suites]]", "[[evaluation.suites]]")
    for name, settings in sets.items():
        Path("data/many.toml").write_text(recipe)
        words = [word for one in settings for word in ("--set", one)]
        assert (
            main(["branch", "models/own", "data/many.toml", "--out", f"many/{name}", *words]) == 0
        )
    labels = {cell.label for cell in Study.of(Path("many")).cells if cell.recipe != "base"}
    assert labels == {"many (a)", "many (b)"}
    shutil.rmtree("many")


def test_of_a_short_question_nothing_is_known_beside_what_was_found_in_the_text() -> None:
    lines(Path("data/prompts2.jsonl"), *({"question": q, "answer": 1} for q in QUESTIONS))
    Path("data/suites.toml").write_text(SUITE.replace("prompts", "prompts2"))
    lines(Path("data/seen.jsonl"), {"text": f"so {QUESTIONS[0]}"})
    words = ["prepare", "data/seen.jsonl", "--tokenizer", "models/own", "--out", "data/seen"]
    assert main([*words, "--quiet"]) == 0
    with megarlx.open("models/own") as run:
        items = run.evaluate("data/suites.toml", keep=True)["t"]["items"]
        folder = str(run.reference.run)
    (found,) = overlaps(folder, suites="data/suites.toml", token_files=["seen=data/seen"])
    assert (found.short, found.by_source) == (4, {"seen": 1})
    (measured,) = found.measured
    shares = [item["correct"] / item["samples"] for item in items]
    assert (measured.found, measured.not_found) == (shares[0], shares[1])
    assert len(set(shares[1:])) > 1  # so that the mean with the short ones is another


QUESTIONS = ["who is the seventh in a row?", "what is the other way to say so?", *"abcd"]
SUITE = """
[[suites]]
name = "t"
kind = "pass_at_k"
path = "data/prompts.jsonl"
samples = 2
max_new_tokens = 2
rewards = [{ function = "data/tools.py:even" }]
"""
