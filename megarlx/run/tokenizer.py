"""The tokenizer that a run keeps, and the template that its questions are put in."""

from __future__ import annotations

from collections.abc import Mapping

from megarlx.config import Config
from megarlx.config.objectives import TemplateConfig
from megarlx.config.run_sections import RESERVED
from megarlx.data.chat_template import ChatTemplate
from megarlx.data.conversations import ROLES, Frames, Template
from megarlx.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from megarlx.run.directory import RunDirectory, RunError
from megarlx.run.made import data_of


def load_tokenizer_of(config: Config, directory: RunDirectory) -> Tokenizer | None:
    """The one that the run keeps, or else the one that its data name."""
    if directory.tokenizer.exists():
        tokenizer = load_tokenizer(str(directory.tokenizer))
    else:
        data = data_of(config)
        if data is None or data.tokenizer is None:
            return None
        if data.tokenizer == "bytes":
            tokenizer = ByteTokenizer()
        else:
            tokenizer = load_tokenizer(data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise RunError(
            f"model.vocab_size is {config.model.vocab_size}; the tokenizer has "
            f"{tokenizer.vocab_size} ids"
        )
    return _with_reserved(tokenizer, config)


def _with_reserved(tokenizer: Tokenizer, config: Config) -> Tokenizer:
    """Ids of the model that no text has, for templates to write."""
    wanted = RESERVED if config.data is None else config.data.reserved_tokens
    room = config.model.vocab_size - tokenizer.vocab_size
    if wanted > max(room, RESERVED):
        raise RunError(
            f"data.reserved_tokens is {wanted}; model.vocab_size = {config.model.vocab_size} "
            f"leaves {room} ids behind the tokenizer's {tokenizer.vocab_size}"
        )
    tokenizer.reserved = min(wanted, room)
    return tokenizer


def templates_of(config: Config) -> dict[str, Template]:
    """By name, those beside the run's own."""
    return written(config.templates)


def written(named: Mapping[str, TemplateConfig]) -> dict[str, Template]:
    return {name: _written(given) for name, given in named.items()}


def template_of(given: TemplateConfig | None) -> Template | None:
    return None if given is None else _written(given)


def _written(given: TemplateConfig) -> Template:
    if given.chat is not None:
        return ChatTemplate(given.chat, given.bos, given.tokens, given.date)
    return Frames(**given.model_dump(include={*ROLES, "opening"}))
