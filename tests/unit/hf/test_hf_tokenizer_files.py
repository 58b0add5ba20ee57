"""AutoTokenizer gives the ids that our tokenizer gave the model, and the texts back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hf_cases import convert, published, save, transformers
from tokenizers import Tokenizer as Engine
from tokenizers import models, pre_tokenizers

from megarlx.config.objectives import TemplateConfig
from megarlx.data.chat_template import ChatTemplate
from megarlx.data.conversations import Conversation, Frames, Turn
from megarlx.data.tokenizer import ByteTokenizer, Tokenizer, WordTokenizer, load_tokenizer
from megarlx.hf.export import learned_template
from megarlx.hf.tokenizer_files import (
    chat_of,
    chat_template,
    hugging_face_tokenizer,
    tokenizer_of_model,
)

TEXTS = ["tom has 3 apples", "apples", "3 3 3 has tom"]
ANY_TEXTS = [*TEXTS, "  two  spaces\n\ttab", "naïve ☃ 日本 \x00\x7f", "", "a" * 50]


def written(tokenizer: Tokenizer, folder: Path) -> Path:
    for name, content in zip(
        ("tokenizer.json", "tokenizer_config.json"), hugging_face_tokenizer(tokenizer), strict=True
    ):
        (folder / name).write_text(json.dumps(content))
    return folder


def engine_file(folder: Path, eos: str = "<|endoftext|>") -> Path:
    words = {word: i for i, word in enumerate([eos, *" ".join(TEXTS).split()])}
    vocabulary = {word: i for i, word in enumerate(words)}
    engine = Engine(models.WordLevel(vocabulary, unk_token=eos))
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    engine.add_special_tokens([eos])
    folder.mkdir(exist_ok=True)
    engine.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("kind", ["words", "bytes", "file"])
def test_ids_and_texts_are_the_same_through_auto_tokenizer(tmp_path: Path, kind: str) -> None:
    ours: Tokenizer
    if kind == "words":
        ours, texts = WordTokenizer(["tom", "has", "3", "apples"]), TEXTS
    elif kind == "bytes":
        ours, texts = ByteTokenizer(), ANY_TEXTS
    else:
        ours, texts = load_tokenizer(engine_file(tmp_path / "source")), TEXTS
    theirs = transformers.AutoTokenizer.from_pretrained(written(ours, tmp_path))
    assert len(theirs) == ours.vocab_size
    assert theirs.eos_token_id == ours.eos_id
    for text in texts:
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == ours.decode(ids) == text


def test_every_byte_has_its_own_id(tmp_path: Path) -> None:
    ours = ByteTokenizer()
    theirs = transformers.AutoTokenizer.from_pretrained(written(ours, tmp_path))
    letters = theirs.convert_ids_to_tokens(list(range(256)))
    assert len(set(letters)) == 256
    for text in (chr(i) for i in range(1, 0x800)):
        assert theirs(text)["input_ids"] == list(text.encode())


def test_files_that_came_with_a_model_go_back_as_they_were(tmp_path: Path) -> None:
    there = save(published("qwen2", eos_token_id=0, bos_token_id=3), tmp_path / "hf")
    engine_file(there)
    beside = {
        "tokenizer_config.json": '{"eos_token": "<|endoftext|>", "odd": [1]}',
        "special_tokens_map.json": '{"eos_token": "<|endoftext|>"}',
        "chat_template.jinja": "{{ messages }}",
        "generation_config.json": '{"eos_token_id": [0, 3], "temperature": 0.6}',
    }
    for name, text in beside.items():
        (there / name).write_text(text)
    convert(there, tmp_path / "run")
    assert load_tokenizer(tmp_path / "run" / "tokenizer.json").encode("tom has") == [1, 2]
    convert(tmp_path / "run", tmp_path / "back", "megarlx>hf")
    for name, text in beside.items():
        if name == "generation_config.json":
            assert json.loads((tmp_path / "back" / name).read_text()) == json.loads(text)
        else:
            assert (tmp_path / "back" / name).read_text() == text
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (
        there / "tokenizer.json"
    ).read_bytes()
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"]) == (0, 3)


def test_an_excursion_exports_with_the_files_of_the_trunk_it_goes_back_to(tmp_path: Path) -> None:
    there = engine_file(save(published("llama"), tmp_path / "hf"))
    (there / "chat_template.jinja").write_text("{{ messages }}")
    convert(there, tmp_path / "trunk")
    # A child has a configuration and weights of its own, and a line back.
    convert(tmp_path / "trunk", tmp_path / "child", "megarlx>megarlx")
    child = tmp_path / "child"
    (child / "huggingface" / "config.json").unlink()
    lineage = json.loads((child / "lineage.json").read_text())
    lineage["parent"] = {"run": str(tmp_path / "trunk"), "iteration": 0}
    (child / "lineage.json").write_text(json.dumps(lineage))
    convert(child, tmp_path / "back", "megarlx>hf")
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == "{{ messages }}"


ODD = "a \"quoted\" {{ thing }} \\ of 'two'\nlines, ☃ and 𝄞"


@pytest.mark.parametrize(
    "template",
    [
        {"user": "question : {content} answer :"},
        {"user": "<|{content}|>\n", "opening": "Answer:\n", "assistant": "{content}\n"},
        {"user": ODD + "{content}" + ODD, "system": "{content}", "opening": ODD},
    ],
)
def test_the_exported_chat_template_writes_what_the_model_was_trained_on(
    tmp_path: Path, template: dict[str, str]
) -> None:
    settings, tokenizer = TemplateConfig(**template), ByteTokenizer()
    (written(tokenizer, tmp_path) / "chat_template.jinja").write_text(
        chat_template(settings, tokenizer)
    )
    found = chat_of(tmp_path, tokenizer)
    assert found == TemplateConfig(chat=chat_template(settings, tokenizer))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    turns = [Turn("system", "be short"), Turn("user", ODD), Turn("assistant", ODD)]
    ours = Frames(**settings.model_dump(exclude={"chat", "bos", "tokens", "date"}))
    read = ChatTemplate(found.chat or "")
    asked = [*turns, Turn("user", "and now?")]
    for given in (asked, asked[1:], asked[:2], asked[-1:]):
        messages = [{"role": turn.role, "content": turn.content} for turn in given]
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert theirs(text)["input_ids"] == ours.prompt_ids(given, tokenizer)
        assert read.prompt_ids(given, tokenizer) == ours.prompt_ids(given, tokenizer)
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    text = theirs.apply_chat_template(messages, tokenize=False)
    conversation = Conversation(tuple(turns))
    assert theirs(text)["input_ids"] == ours.encode(conversation, tokenizer)[0]
    assert read.encode(conversation, tokenizer) == ours.encode(conversation, tokenizer)


@pytest.mark.parametrize(
    ("ends", "eos"), [([0, 1], "<turn>"), (1, "<turn>"), (0, "<fin>"), (None, "<fin>")]
)
def test_texts_end_as_the_answers_of_a_models_chat_template_do(
    tmp_path: Path, ends: list[int] | int | None, eos: str
) -> None:
    """Where generation_config.json names their end; a template of the tokenizer's own end wins."""
    engine = Engine(models.WordLevel({"<fin>": 0, "<turn>": 1, "2": 2}, unk_token="<fin>"))
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    engine.add_special_tokens(["<fin>", "<turn>"])
    engine.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<fin>"}')
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    for end, found in (("<turn>", eos), ("<turn> <fin>", "<fin>")):
        chat = f"{{% for m in messages %}}{{{{ m.content }}}} {end} {{% endfor %}}"
        (tmp_path / "chat_template.jinja").write_text(chat)
        tokenizer = tokenizer_of_model(tmp_path)
        assert tokenizer is not None
        assert tokenizer.eos_text == found


def test_a_model_that_saw_pre_training_only_has_no_chat_template(tmp_path: Path) -> None:
    (tmp_path / "resolved.json").write_text('{"template": {"user": "Q {content}"}}')
    before = {"run": {"tokens": {"pretraining": 10, "sft": 0}}}
    assert learned_template(tmp_path, before) is None
    after = {"run": {"tokens": {"pretraining": 10, "sft": 3}}}
    assert learned_template(tmp_path, after) == TemplateConfig(user="Q {content}")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path: Path) -> None:
    there = engine_file(save(published("olmo2", vocab_size=3), tmp_path / "hf"))
    with pytest.raises(ValueError, match="tokenizer has 5 ids; the model's vocab_size is 3"):
        convert(there, tmp_path / "run")


def test_a_tokenizer_that_does_not_say_its_end_is_told(tmp_path: Path) -> None:
    there = engine_file(save(published("olmo2"), tmp_path / "hf"), eos="<fin>")
    with pytest.raises(ValueError, match="which token ends a document is not said"):
        convert(there, tmp_path / "run")
    convert(there, tmp_path / "run", eos="<fin>")
    assert load_tokenizer(tmp_path / "run" / "tokenizer.json").eos_id == 0
