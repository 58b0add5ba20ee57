"""The tokenizer beside a model: Hugging Face's files kept as they came, or made from ours."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from megarlx import plug
from megarlx.config.objectives import PLACE, TemplateConfig
from megarlx.config.run_sections import DataConfig
from megarlx.data.chat_template import ChatTemplate, NotLearnedError
from megarlx.data.conversations import Conversation, ConversationError, Turn
from megarlx.data.making import made
from megarlx.data.tokenizer import (
    EOS,
    RESERVED,
    ByteTokenizer,
    Tokenizer,
    WordTokenizer,
    load_tokenizer,
)
from megarlx.hf.config_map import read_json
from megarlx.hf.errors import ConversionError

CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
TRIED = Conversation((Turn("user", "1 + 1?"), Turn("assistant", "2")))
# What comes with a model besides its tensors, and goes back with it.
KEPT = (
    *("config.json", "generation_config.json", "tokenizer.json", TOKENIZER_CONFIG),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("tokenizer.model", CHAT_TEMPLATE),
)
TOKENIZER_FILES = tuple(n for n in KEPT if n not in ("config.json", "generation_config.json"))


def keep(source: Path, target: Path) -> None:
    """Copies what is there of the files beside the tensors."""
    target.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def hugging_face_tokenizer(tokenizer: Tokenizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json, from which AutoTokenizer makes the same ids."""
    if isinstance(tokenizer, WordTokenizer):
        definition = _words(tokenizer)
    elif isinstance(tokenizer, ByteTokenizer):
        definition = _bytes(tokenizer)
    else:
        definition = tokenizer.definition()["tokenizer"]
    eos = tokenizer.definition().get("eos", EOS)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "clean_up_tokenization_spaces": False,
    }
    return definition, config


def chat_template(template: TemplateConfig, tokenizer: Tokenizer) -> str:
    """A run's [template] in Jinja, for `apply_chat_template`: the text whose ids it was trained on,
    `add_generation_prompt` for what stands before an answer."""
    if template.chat is not None:
        return template.chat
    assert template.user is not None  # the configuration saw to it
    texts = (template.user, template.system, template.opening, template.assistant)
    if any(RESERVED.search(text) for text in texts):
        raise ConversionError(
            "the template writes reserved tokens, which have no text in a tokenizer of Hugging "
            "Face; allowed is a template without them"
        )

    bos = tokenizer.bos_text
    begins = bool(bos) and not template.user.startswith(bos)

    def literal(text: str) -> str:
        return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""

    def turn(frame: str) -> str:
        before, after = frame.split(PLACE)
        space = _first_space(before, tokenizer) if begins else ""
        return space + literal(before) + "{{ message['content'] }}" + literal(after)

    opening, end = literal(template.opening), literal(tokenizer.eos_text) + "{% endif %}"
    roles = (
        "{% if message['role'] == 'user' %}" + turn(template.user),
        "{% elif message['role'] == 'system' %}" + turn(template.system),
        "{% elif message['role'] == 'tool' %}" + turn(template.tool),
        "{% else %}" + opening + turn(template.assistant) + end,
    )
    prompt = "{% if add_generation_prompt %}" + opening + "{% endif %}" if opening else ""
    return (
        (literal(bos) if begins else "")
        + "{% for message in messages %}"
        + "".join(roles)
        + "{% endfor %}"
        + prompt
    )


def _first_space(before: str, tokenizer: Tokenizer) -> str:
    """What a tokenizer writes before the first word of a text, and not behind a token, as the one
    that begins a document: there the template has to write it."""
    if tokenizer.encode("a") == tokenizer.encode("a", inside=True):
        return ""
    if before.startswith((" ", *tokenizer.special_texts)):
        return ""
    space = "' '" if before else "'' if message['content'].startswith(' ') else ' '"
    return "{% if loop.first %}{{ " + space + " }}{% endif %}"


def chat_of(folder: Path, tokenizer: Tokenizer | None) -> TemplateConfig | None:
    """How a model says that its conversations are written, if it does; raises ConversationError
    where that cannot be followed."""
    config_path = folder / TOKENIZER_CONFIG
    config = read_json(config_path) if config_path.is_file() else {}
    chat: Any = config.get("chat_template")
    if (folder / CHAT_TEMPLATE).is_file():
        chat = (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
    if isinstance(chat, list):  # several by name
        named = {one.get("name"): one.get("template") for one in chat if isinstance(one, dict)}
        chat = named.get("default")
    if not isinstance(chat, str) or not chat or tokenizer is None:
        return None
    tokens = _tokens_of(chat, config)
    bos = tokens.pop("bos_token", "")
    today = date.today().isoformat() if "strftime_now" in chat else ""
    found = TemplateConfig(chat=chat, bos=bos, tokens=tokens, date=today)
    not_taught(found, tokenizer)
    return found


def not_taught(template: TemplateConfig, tokenizer: Tokenizer) -> str:
    """Why a model cannot be taught in its chat template; "" where it can. Raises ConversationError
    where it cannot be asked either."""
    assert template.chat is not None
    chat = ChatTemplate(template.chat, template.bos, template.tokens, template.date)
    chat.prompt_ids(TRIED.question, tokenizer)
    try:
        chat.encode(TRIED, tokenizer)
    except NotLearnedError as error:
        return str(error)
    return ""


def _tokens_of(chat: str, config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens of a tokenizer_config.json that a template calls by name."""
    found = {}
    called = {"bos_token", *re.findall(r"\b[a-z_]+_token\b", chat)}
    for name in sorted(called & config.keys()):
        token = config[name]
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[name] = token
    return found


def tokenizer_of_model(folder: Path) -> Tokenizer | None:
    """The one beside a model. Where answers of its chat template do not end in the tokenizer's own
    end of text, but in another token that ends its generation, texts end in that one here: Gemma's
    texts end in <eos>, its answers in <end_of_turn>."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    usual = load_tokenizer(path)
    names = (usual.decode([i]) for i in _ends(folder) if 0 <= i < usual.vocab_size)
    for eos in (usual.eos_text, *names):
        ended = load_tokenizer(path, eos)
        try:
            chat_of(folder, ended)
        except ConversationError:
            continue
        return ended
    return usual


def _ends(folder: Path) -> list[int]:
    """Ids that end a generation, as the model's files say."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        held = read_json(folder / name) if (folder / name).is_file() else {}
        said = held.get("eos_token_id")
        found += [i for i in (said if isinstance(said, list) else [said]) if isinstance(i, int)]
    return found


def _definition(**parts: Any) -> dict[str, Any]:
    empty = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    return {"version": "1.0", **dict.fromkeys(empty), "added_tokens": [], **parts}


def _added(token: str, number: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **flags, "special": True}


def _words(tokenizer: WordTokenizer) -> dict[str, Any]:
    vocabulary = {word: i for i, word in enumerate((EOS, *tokenizer.words))}
    # A word that is not in the list is no token there either: it would be left out in silence, so
    # it becomes the end of the text, which shows.
    return _definition(
        added_tokens=[_added(EOS, 0)],
        pre_tokenizer={"type": "WhitespaceSplit"},
        model={"type": "WordLevel", "vocab": vocabulary, "unk_token": EOS},
    )


def _bytes(tokenizer: ByteTokenizer) -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    vocabulary = {letter: byte for byte, letter in enumerate(_letters())}
    return _definition(
        added_tokens=[_added(EOS, tokenizer.eos_id)],
        pre_tokenizer={**level, "use_regex": False},
        decoder={**level, "use_regex": False},
        model={
            "type": "BPE",
            "vocab": vocabulary | {EOS: tokenizer.eos_id},
            "merges": [],
            **dict.fromkeys(
                ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
            ),
            "fuse_unk": False,
            "byte_fallback": False,
        },
    )


def _letters() -> Iterator[str]:
    """The printable letter that byte-level tokenizers write for each byte, 0 to 255."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = 0
    for byte in range(256):
        if byte in printable:
            yield chr(byte)
        else:
            yield chr(256 + others)
            others += 1


def tokenizer_of_run(run: Path) -> Tokenizer | None:
    """The one kept with the run, or the one that its configuration names."""
    if (run / "tokenizer.json").is_file():
        return load_tokenizer(run / "tokenizer.json")
    data = read_json(run / "resolved.json").get("data") or {}
    if data.get("maker") in plug.ours("data maker"):  # another's code is not run unasked
        read = DataConfig.model_validate(data)
        return load_tokenizer(made(data["maker"], read.place, read.options).tokenizer)
    return load_tokenizer(data["tokenizer"]) if data.get("tokenizer") else None


def kept_files(run: Path) -> Path | None:
    """What came from Hugging Face with this run or with the run it goes back to."""
    seen: set[Path] = set()
    here: Path | None = run
    while here is not None and here not in seen:
        if (here / "huggingface" / "config.json").is_file():
            return here / "huggingface"
        seen.add(here)
        lineage = here / "lineage.json"
        parent = None
        if lineage.is_file():
            parent = read_json(lineage).get("parent")
        here = Path(str(parent["run"])) if isinstance(parent, dict) and "run" in parent else None
    return None
