"""A conversation as a model's own chat template writes it (Jinja, as Hugging Face has it).

The template is rendered in Jinja's sandbox, once for each place up to which a conversation is
known. Special tokens are those that the template writes; the same text in a turn stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any

from megarlx.data.conversations import THOUGHTS, Conversation, ConversationError, Turn
from megarlx.data.tokenizer import RESERVED, Tokenizer

if TYPE_CHECKING:
    import jinja2
    from jinja2.nodes import Node
    from jinja2.parser import Parser

LONGEST_TEXT = 1 << 27  # characters that a template may write
# Put into what a turn says where that would write a special token; of the private use area.
BREAKS = [chr(code) for code in range(0xE000, 0xE100)]
SOMETHING = "."  # said by turns that only stand before others


class NotLearnedError(ConversationError):
    """A template in which a model can be asked, but not be taught: a prompt of DeepSeek-R1's opens
    the thoughts, which its answers are told without."""


@dataclass(frozen=True)
class ChatTemplate:
    """`bos` is what the template calls bos_token, `tokens` has others by such names; eos_token is
    the tokenizer's where they do not say it. `date`: what the template is told is today."""

    chat: str
    bos: str = ""
    tokens: Mapping[str, str] = field(default_factory=dict)
    date: str = ""

    @property
    def described(self) -> dict[str, str]:
        told = {"date": self.date} if self.date else {}
        return {"chat": self.chat, "bos": self.bos, **self.tokens, **told}

    def prompt_ids(
        self, turns: Iterable[Turn], tokenizer: Tokenizer, *, follows: bool = False
    ) -> list[int]:
        """What stands before the next answer. `follows`: behind an answer that has been given,
        and its end of text."""
        turns = list(turns)
        written = self._written(tokenizer, turns)
        if follows:
            parts = written.parts_behind(turns, asks=True)
        else:
            parts = written.parts(turns, written.text(turns, asks=True))
        return written.ids_of((part for part, _ in parts), inside=follows)

    def encode(
        self, conversation: Conversation, tokenizer: Tokenizer
    ) -> tuple[list[int], list[bool]]:
        """The ids, and for each whether the model is to learn to say it: of every answer what it
        would be asked for there, with its end. A template that tells earlier answers differently
        from the last has only the last learned."""
        turns = list(conversation.turns)
        written = self._written(tokenizer, turns, conversation.tools)
        ids: list[int] = []
        learned: list[bool] = []
        text = written.text(turns)
        _check_tells_calls(turns, written.specials.sub("", text))
        for part, said in written.parts(turns, text):
            these = written.ids(part, bool(ids))
            ids += these
            learned += [said] * len(these)
        if True not in learned:
            written.end(text, max(0, text.rfind(turns[-1].content)))
            raise NotLearnedError("chat template: it does not write the answer that it asks for")
        return ids, learned

    def example_ids(
        self, example: Conversation, tokenizer: Tokenizer, separator: str | None, first: bool
    ) -> list[int]:
        """As an earlier turn of what follows, up to the end of the answer: what follows writes what
        stands between."""
        before = [] if first else [Turn("user", SOMETHING), Turn("assistant", SOMETHING)]
        asked = [*before, *example.question]
        written = self._written(tokenizer, example.turns, example.tools)
        text = written.text([*asked, example.turns[-1], Turn("user", SOMETHING)])
        opening = written.text(asked, asks=True)
        written.check_begins(text, opening)
        place = 0 if first else written.end(text, len(written.text(before[:1], asks=True)))
        parts = [part for part, _ in written.parts(asked, opening, place)]
        parts.append(text[len(opening) : written.end(text, len(opening))])
        return written.ids_of(parts, inside=not first)

    def _written(self, tokenizer: Tokenizer, turns: Sequence[Turn], tools: str = "") -> _Written:
        given = {"bos_token": self.bos, "eos_token": tokenizer.eos_text, **self.tokens}
        return _Written(self._template, given, tokenizer, turns, tools)

    @cached_property
    def _template(self) -> jinja2.Template:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: object) -> None:
            raise ConversationError(f"chat template: {message}")

        def today(form: str) -> str:
            if not self.date:
                refuse('it asks for today\'s date; write template.date = "YYYY-MM-DD"')
            return date.fromisoformat(self.date).strftime(form)

        class Generation(Extension):
            """{% generation %}: tells transformers what an assistant says, and writes nothing."""

            tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

            def parse(self, parser: Parser) -> list[Node]:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        sandbox = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
        )
        sandbox.globals["raise_exception"] = refuse
        sandbox.globals["strftime_now"] = today
        sandbox.filters["tojson"] = _json
        try:
            return sandbox.from_string(self.chat)
        except jinja2.TemplateError as error:
            raise ConversationError(f"chat template: {error}") from error


class _Written:
    """A template with a tokenizer: texts in which special tokens of turns are broken, their ids."""

    def __init__(
        self,
        template: jinja2.Template,
        tokens: Mapping[str, str],
        tokenizer: Tokenizer,
        turns: Sequence[Turn],
        tools: str,
    ) -> None:
        self.template, self.tokens, self.tokenizer = template, tokens, tokenizer
        self.tools = tools
        specials = sorted(tokenizer.special_texts, key=len, reverse=True)
        self.specials = re.compile("|".join([*map(re.escape, specials), RESERVED.pattern]))
        said = (turn.content + turn.calls + turn.more for turn in turns)
        self.broken = _unused([tools, *said])

    def text(self, turns: Sequence[Turn], asks: bool = False) -> str:
        import jinja2

        given: dict[str, Any] = {
            **self.tokens,
            "messages": [self._message(turn) for turn in turns],
            "add_generation_prompt": asks,
            "tools": json.loads(self._safe(self.tools)) if self.tools else None,
        }
        try:
            text = _limited(self.template.generate(given))
        except ConversationError:
            raise
        except (jinja2.TemplateError, TypeError, ValueError, OverflowError) as error:
            raise ConversationError(f"chat template: {error}") from error
        return text

    def _message(self, turn: Turn) -> dict[str, Any]:
        message: dict[str, Any] = {"role": turn.role, "content": self._safe(turn.content)}
        if turn.more:
            message |= json.loads(self._safe(turn.more))
            thoughts = [message[key] for key in THOUGHTS if key in message]
            message |= {"reasoning_content": thoughts[0]} if thoughts else {}
        if turn.calls:
            message["tool_calls"] = [_call(one) for one in json.loads(self._safe(turn.calls))]
        return message

    def _safe(self, content: str) -> str:
        return self.specials.sub(lambda m: f"{m[0][0]}{self.broken}{m[0][1:]}", content)

    def parts(self, turns: Sequence[Turn], text: str, place: int = 0) -> Iterator[tuple[str, bool]]:
        """The text from `place` on, cut before and behind each answer, and whether a part is one:
        no token reaches over a cut, as none does where the answer was sampled."""
        for begin, end in self.answers(turns, text):
            if begin >= place:
                yield text[place:begin], False
                yield text[begin:end], True
                place = end
        yield text[place:], False

    def parts_behind(self, turns: Sequence[Turn], asks: bool) -> Iterator[tuple[str, bool]]:
        """Of what is written behind an answer that has been given, whatever it was."""
        asked = self.text([Turn("user", SOMETHING)], asks=True)
        turns = [Turn("user", SOMETHING), Turn("assistant", SOMETHING), *turns]
        text = self.text(turns, asks)
        self.check_begins(text, asked)
        yield from self.parts(turns, text, self.end(text, len(asked)))

    @staticmethod
    def check_begins(text: str, asked: str) -> None:
        if not text.startswith(asked):
            raise ConversationError("chat template: what follows changes what stands before")

    def answers(self, turns: Sequence[Turn], text: str) -> Iterator[tuple[int, int]]:
        """Where each answer begins and where its end of text ends."""
        for at, turn in enumerate(turns):
            if turn.role == "assistant":
                before = self.text(turns[:at], asks=True)
                through = self.text(turns[: at + 1])
                if text.startswith(before) and text.startswith(through):
                    yield len(before), self.end(through, len(before))

    def end(self, text: str, begin: int) -> int:
        """Behind the end of the answer that begins there."""
        eos = self.tokenizer.eos_text
        found = text.find(eos, begin)
        if found < 0:
            raise ConversationError(
                f"chat template: an answer does not end in {eos!r}, the tokenizer's end of text; "
                "convert the model with --eos TOKEN, the token that ends its answers"
            )
        return found + len(eos)

    def ids_of(self, parts: Iterable[str], inside: bool) -> list[int]:
        found: list[int] = []
        for part in parts:
            found += self.ids(part, inside or bool(found))
        return found

    def ids(self, text: str, inside: bool) -> list[int]:
        """Special tokens that the template wrote become their ids; all between them is text."""
        found: list[int] = []
        place, takes = 0, False
        for match in self.specials.finditer(text):
            takes_before, takes_behind = self.tokenizer.takes_space(match[0])
            before = text[place : match.start()]
            before = before.lstrip() if takes else before
            found += self._plain(before.rstrip() if takes_before else before, inside or place > 0)
            found += self.tokenizer.encode_frame(match[0])
            place, takes = match.end(), takes_behind
        left = text[place:]
        return found + self._plain(left.lstrip() if takes else left, inside or place > 0)

    def _plain(self, text: str, inside: bool) -> list[int]:
        return self.tokenizer.encode(text.replace(self.broken, ""), inside=inside)


def _json(value: Any, ensure_ascii: bool = False, **asked: Any) -> str:
    """As Hugging Face has it: Jinja's own escapes for HTML. `asked`: indent, separators, …"""
    return json.dumps(value, ensure_ascii=ensure_ascii, **asked)


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """Arguments may be JSON in a text; templates want the object."""
    function = call.get("function")
    inner = function if isinstance(function, dict) else call
    if isinstance(given := inner.get("arguments"), str):
        try:
            inner = {**inner, "arguments": json.loads(given)}
        except ValueError:
            return call
    return {**call, "function": inner} if isinstance(function, dict) else inner


def _check_tells_calls(turns: Iterable[Turn], text: str) -> None:
    """A template may know of no calls; an answer that makes one would be learned to say nothing."""
    calls = (_call(one) for turn in turns if turn.calls for one in json.loads(turn.calls))
    for call in calls:
        name = call.get("function", call).get("name")
        if isinstance(name, str) and name not in text:
            raise ConversationError(
                f"chat template: it does not write the call of {name!r}; a template that knows "
                "tool_calls does, and so does a [template] in frames, as JSON behind the content"
            )


def _limited(parts: Iterable[str]) -> str:
    held, length = [], 0
    for part in parts:
        held.append(part)
        length += len(part)
        if length > LONGEST_TEXT:
            raise ConversationError(f"chat template: writes more than {LONGEST_TEXT:,} characters")
    return "".join(held)


def _unused(texts: Iterable[str]) -> str:
    """A character that none of them has."""
    said = "".join(texts)
    for one in BREAKS:
        if one not in said:
            return one
    raise ConversationError(f"a conversation holds all {len(BREAKS)} characters from U+E000 on")
