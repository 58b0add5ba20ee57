"""The walk done again, with a model of another kind: a tokenizer that begins texts, answers that
end in another token than texts do, a reward of one's own in the suites."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Engine

import megarlx
from megarlx.cli import main

transformers = pytest.importorskip("transformers")

CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "<start>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>model\n{% endif %}"
)
SUITES = """
[[suites]]
name = "text"
kind = "perplexity"
path = "data/text.jsonl"
[[suites]]
name = "sums"
kind = "pass_at_k"
path = "data/questions.jsonl"
samples = 2
max_new_tokens = 4
rewards = [{ function = "data/reward.py:short" }]
"""
SFT = """
[training]
sequence_length = 64
sequences_per_step = 2
sequences_per_microbatch = 2
[sft]
conversations = "data/questions.jsonl"
[[stages]]
steps = 1
[stages.objectives.sft]
lr = 1e-3
warmup_steps = 0
[checkpoints]
[evaluation]
at_end = true
""" + SUITES.replace("[[suites]]", "[[evaluation.suites]]")
TEXT = "one and one"


def own_model(folder: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    engine = Engine(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.decoder = decoders.ByteLevel()
    specials = ("<bos>", "<eos>", "<start>", "<end_of_turn>")
    engine.add_special_tokens([AddedToken(token, special=True) for token in specials])
    engine.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", engine.token_to_id("<bos>"))]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=engine, bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.chat_template = CHAT
    config = transformers.Gemma3TextConfig(
        vocab_size=264,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=48,
        max_position_embeddings=256,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=16,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
    )
    transformers.set_seed(6)
    model = transformers.Gemma3ForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=256, eos_token_id=[257, 259], pad_token_id=257
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("second")
    data = folder / "data"
    data.mkdir()
    own_model(folder / "models" / "own")
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(4)]
    (data / "questions.jsonl").write_text("".join(json.dumps(row) + "\r\n" for row in rows))
    (data / "text.jsonl").write_text(json.dumps({"text": TEXT}))
    (data / "reward.py").write_text(
        "def short(samples):\n    return [1.0 - s.tokens / 8 for s in samples]\n"
    )
    (data / "suites.toml").write_text(SUITES)
    (data / "sft.toml").write_text(SFT)
    return folder


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def test_a_text_and_a_conversation_are_read_as_transformers_reads_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = transformers.AutoTokenizer.from_pretrained("models/own")
    theirs = transformers.AutoModelForCausalLM.from_pretrained("models/own")
    asked = [{"role": "user", "content": TEXT}]
    with megarlx.open("models/own") as run:
        said = capsys.readouterr().err
        raw, chat = run.prompt_ids(TEXT, raw=True), run.prompt_ids(asked)
        sampled = run.sample([TEXT], raw=True, temperature=0, max_new_tokens=6)
        results = run.evaluate("data/suites.toml", names=["text"])
    assert "answers of its chat template end in '<end_of_turn>', not in '<eos>'" in said
    assert raw == words(TEXT).input_ids
    assert chat == words.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    ids = torch.tensor([raw])
    with torch.no_grad():
        loss = theirs(ids, labels=ids).loss
        greedy = theirs.generate(ids, max_new_tokens=6, do_sample=False)
    assert results["text"]["metrics"]["nll"] == pytest.approx(float(loss), abs=1e-5)
    assert sampled.made[0].tokens.tolist() == greedy[0, len(raw) :].tolist()


def test_a_model_is_measured_by_the_suites_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "models/own", "--config", "data/suites.toml"]) == 0
    assert main(["evaluate", "models/own", "--config", "data/sft.toml"]) == 0
    assert "text: there already\nsums: there already" in capsys.readouterr().out


def test_what_a_run_names_next_can_be_typed(capsys: pytest.CaptureFixture[str]) -> None:
    """Its suites are scored by a reward of the user's, which another run may not name unasked."""
    assert main(["branch", "models/own", "data/sft.toml", "--out", "runs/sft"]) == 0
    evaluate, branch, report = capsys.readouterr().out.rpartition("; next: ")[2].split(", megarlx ")
    assert main(shlex.split(evaluate)[1:]) == 0
    recipe = Path("data/more.toml")
    recipe.write_text(SFT.partition("[evaluation]")[0])  # with the suites that its parent has
    words = [
        {"RECIPE.toml": str(recipe), "RUN2": "runs/more"}.get(w, w) for w in shlex.split(branch)
    ]
    assert main(words) == 0
    assert main(shlex.split(report)) == 0


def test_the_model_goes_back_and_ends_its_answers_as_it_came() -> None:
    assert main(["convert", "runs/sft", "models/back", "--verify", "--quiet"]) == 0
    words = transformers.AutoTokenizer.from_pretrained("models/back")
    assert words.chat_template == CHAT
    assert words(TEXT).input_ids[0] == words.bos_token_id
    ends = transformers.GenerationConfig.from_pretrained("models/back").eos_token_id
    assert ends == [257, 259]
