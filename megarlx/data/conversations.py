"""Conversations for supervised fine-tuning: reading them, and turning them into ids.

A file holds one conversation a line:

    {"messages": [{"role": …, "content": …}, …]}    also with "tools", and turns of tools
    {"question": …, "answer": …}                    or "answers": […], several demonstrations
    {"prompt": …, "completion": …}                  texts, or lists of messages
    {"text": …}                                     all of it learned, in no template
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from megarlx.data.documents import BadLineError, lines
from megarlx.data.order import key_of
from megarlx.data.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant", "tool", "text"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")
PLACE = "{content}"
# What a message's reasoning is called; templates read the first.
THOUGHTS = ("reasoning_content", "thinking", "reasoning")


class ConversationError(ValueError):
    """Conversations or a template that cannot be used."""


@dataclass(frozen=True)
class Turn:
    """`calls`: of tools, by the assistant, as a JSON list; "" where there are none. `more`: the
    message's other fields, for chat templates, as a JSON object; "" likewise."""

    role: Role
    content: str
    calls: str = ""
    more: str = ""


# Turns, or as Hugging Face has them: {"role": …, "content": …}.
Messages = Sequence[Turn | Mapping[str, Any]]


@dataclass(frozen=True)
class Conversation:
    """Turns of which the last is the assistant's. What comes before it is the question.

    A text alone is one turn, of the role "text". `tools` are those that may be called, as a JSON
    list; "" where there are none.
    """

    turns: tuple[Turn, ...]
    tools: str = ""

    @property
    def question(self) -> tuple[Turn, ...]:
        return self.turns[:-1]


@dataclass(frozen=True)
class Keys:
    """Names of the fields of a line."""

    messages: str = "messages"
    question: str = "question"
    answer: str = "answer"
    answers: str = "answers"
    prompt: str = "prompt"
    completion: str = "completion"
    text: str = "text"
    tools: str = "tools"


class Template(Protocol):
    """How conversations are written for a model."""

    @property
    def described(self) -> dict[str, str]:
        """All that decides about it, as a result or a resume compares it."""
        ...

    def prompt_ids(
        self, turns: Iterable[Turn], tokenizer: Tokenizer, *, follows: bool = False
    ) -> list[int]:
        """What stands before the next answer: the same ids in training and in generation.
        `follows`: behind an answer that has been given, and its end of text."""
        ...

    def encode(
        self, conversation: Conversation, tokenizer: Tokenizer
    ) -> tuple[list[int], list[bool]]:
        """The ids, and for each whether the model is to learn to say it."""
        ...

    def example_ids(
        self, example: Conversation, tokenizer: Tokenizer, separator: str | None, first: bool
    ) -> list[int]:
        """A solved example before a question, and what stands between; `first` of its prompt."""
        ...


@dataclass(frozen=True)
class Frames:
    """How a turn is written; {content} stands for its text.

    `opening` is what the model is given before each of its answers. All of `assistant`, and after
    it the token that ends a document, is what it learns to say itself. Special tokens of the
    tokenizer, and <reserved_0> and so on, may be written in the template; in the content of a turn
    they stay plain text.
    """

    user: str
    system: str = "{content}\n"
    opening: str = ""
    assistant: str = " {content}"
    tool: str = "{content}\n"

    def __post_init__(self) -> None:
        for role in ROLES:
            if getattr(self, role).count(PLACE) != 1:
                raise ConversationError(
                    f"template: {role} is {getattr(self, role)!r}; it must hold {PLACE} once"
                )

    @property
    def described(self) -> dict[str, str]:
        return asdict(self)

    def prompt_ids(
        self, turns: Iterable[Turn], tokenizer: Tokenizer, *, follows: bool = False
    ) -> list[int]:
        """A turn is written the same wherever it stands."""
        ids: list[int] = []
        for turn in turns:
            given, said = self._turn_ids(turn, tokenizer, inside=follows or bool(ids))
            ids += given + said
        ids += tokenizer.encode_frame(self.opening, inside=follows or bool(ids))
        return ids if follows else tokenizer.begun(ids)

    def encode(
        self, conversation: Conversation, tokenizer: Tokenizer
    ) -> tuple[list[int], list[bool]]:
        if conversation.tools:
            raise ConversationError(
                "a conversation lists tools, for which [template] in frames has no place; a "
                "model's own chat template has one, or a system's turn tells them"
            )
        ids, learned = self._encoded(conversation, tokenizer)
        whole = tokenizer.begun(ids)
        return whole, [False] * (len(whole) - len(ids)) + learned

    def example_ids(
        self, example: Conversation, tokenizer: Tokenizer, separator: str | None, first: bool
    ) -> list[int]:
        ids, _ = self._encoded(example, tokenizer, inside=not first)
        ids = tokenizer.begun(ids) if first else ids
        return ids if separator is None else ids[:-1] + tokenizer.encode(separator, inside=True)

    def _encoded(
        self, conversation: Conversation, tokenizer: Tokenizer, inside: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Without what begins a document."""
        ids: list[int] = []
        learned: list[bool] = []
        for turn in conversation.turns:
            given, said = self._turn_ids(turn, tokenizer, inside=inside or bool(ids))
            ids += given + said
            learned += [False] * len(given) + [True] * len(said)
        return ids, learned

    def _turn_ids(
        self, turn: Turn, tokenizer: Tokenizer, *, inside: bool
    ) -> tuple[list[int], list[int]]:
        if thoughts := [key for key in THOUGHTS if turn.more and key in json.loads(turn.more)]:
            raise ConversationError(
                f"a message has {thoughts[0]}, for which [template] in frames has no place; a "
                "model's own chat template may have one"
            )
        opening: list[int] = []
        if turn.role == "assistant":
            opening = tokenizer.encode_frame(self.opening, inside=inside)
            inside = inside or bool(opening)
        said = "\n".join(filter(None, (turn.content, turn.calls)))
        ids = self._written(getattr(self, turn.role), said, tokenizer, inside)
        return (opening, [*ids, tokenizer.eos_id]) if turn.role == "assistant" else (ids, [])

    @staticmethod
    def _written(frame: str, content: str, tokenizer: Tokenizer, inside: bool) -> list[int]:
        """In one piece, so that words meet as they do in running text; in three where the frame
        holds special tokens, which the content must not be able to write."""
        before, after = frame.split(PLACE)
        if not any(tokenizer.has_frame(part) for part in (before, after)):
            return tokenizer.encode(before + content + after, inside=inside)
        ids = tokenizer.encode_frame(before, inside=inside)
        ids += tokenizer.encode(content, inside=inside or bool(ids))
        return ids + tokenizer.encode_frame(after, inside=inside or bool(ids))


def read_conversations(
    path: str | Path,
    keys: Keys | None = None,
    on_bad_line: Literal["stop", "skip"] = "stop",
    skipped: list[BadLineError] | None = None,
) -> Iterator[Conversation]:
    """The conversations of a JSONL file (also .gz, .zst) in order; several answers to a question
    are several conversations. Bad lines stop, or are appended to `skipped`."""
    keys = keys or Keys()
    for number, line in enumerate(lines(str(path)), start=1):
        if not line.strip():
            continue
        try:
            found = list(_conversations(json.loads(line), keys))
        except (ValueError, RecursionError) as error:
            reason = str(error) if isinstance(error, _Reason) else f"not JSON: {error}"
            bad = BadLineError(str(path), number, reason)
            if on_bad_line == "stop":
                raise bad from None
            if skipped is not None:
                skipped.append(bad)
            continue
        yield from found


class _Reason(ValueError):
    """Why an object is no conversation."""


def _conversations(value: Any, keys: Keys) -> Iterator[Conversation]:
    if not isinstance(value, dict):
        raise _Reason(f"holds a {type(value).__name__}; expected an object")
    tools = _json_list(value.get(keys.tools), keys.tools)
    if keys.messages in value:
        yield _from_messages(value[keys.messages], keys.messages, tools)
        return
    if keys.prompt in value and keys.completion in value:
        said = _as_messages(value[keys.prompt], keys.prompt, "user")
        said = said + _as_messages(value[keys.completion], keys.completion, "assistant")
        yield _from_messages(said, f"{keys.prompt} and {keys.completion}", tools)
        return
    if keys.question not in value and keys.text in value:
        yield Conversation((Turn("text", _string(value[keys.text], f"'{keys.text}'")),))
        return
    if keys.question not in value or not (keys.answer in value or keys.answers in value):
        found = ", ".join(list(value)[:10]) or "none"
        raise _Reason(
            f"has none of '{keys.messages}', '{keys.question}' with '{keys.answer}' or "
            f"'{keys.answers}', '{keys.prompt}' with '{keys.completion}', and '{keys.text}' "
            f"(its keys: {found})"
        )
    answers = value[keys.answers] if keys.answers in value else [value[keys.answer]]
    if not isinstance(answers, list) or not answers:
        raise _Reason(f"'{keys.answers}' must be a list of at least one answer")
    question = Turn("user", _string(value[keys.question], f"'{keys.question}'"))
    for at, answer in enumerate(answers):
        text = _string(with_numbers(answer), f"answer {at}")
        yield Conversation((question, Turn("assistant", text)))


def with_numbers(answer: Any) -> Any:
    """A number as its text; all else as it is."""
    is_number = isinstance(answer, int | float) and not isinstance(answer, bool)
    return str(answer) if is_number else answer


def _as_messages(value: Any, key: str, role: Role) -> list[Any]:
    if isinstance(value, list):
        return value
    return [{"role": role, "content": _string(value, f"'{key}'")}]


def _json_list(value: Any, what: str) -> str:
    """A list of objects as JSON, or "" for none."""
    if value is None or value == []:
        return ""
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise _Reason(f"'{what}' must be a list of objects")
    return _string(json.dumps(value, ensure_ascii=False), f"'{what}'")


def turns_of(messages: Messages) -> list[Turn]:
    """Of turns, or of messages with role and content."""
    try:
        return [
            message if isinstance(message, Turn) else _turn_of(message, at)
            for at, message in enumerate(messages)
        ]
    except _Reason as error:
        raise ConversationError(str(error)) from None


def _turn_of(message: Any, at: int) -> Turn:
    if not isinstance(message, dict) or "role" not in message:
        raise _Reason(f"message {at} must be an object with role and content")
    calls = _json_list(message.get("tool_calls"), f"message {at}'s tool_calls")
    content = message.get("content")
    if content is None and calls:
        content = ""
    role = message["role"]
    if role not in ROLES:
        raise _Reason(f"message {at} has role {role!r}; allowed {', '.join(ROLES)}")
    if calls and role != "assistant":
        raise _Reason(f"message {at} is the {role}'s; only the assistant calls tools")
    if "content" not in message and not calls:
        raise _Reason(f"message {at} must be an object with role and content")
    more = {k: v for k, v in message.items() if k not in ("role", "content", "tool_calls")}
    more = {k: v for k, v in more.items() if v is not None}
    said = _string(json.dumps(more, ensure_ascii=False), f"message {at}") if more else ""
    return Turn(role, _string(content, f"message {at}'s content"), calls, said)


def _from_messages(messages: Any, key: str, tools: str) -> Conversation:
    if not isinstance(messages, list) or not messages:
        raise _Reason(f"'{key}' must be a list of at least one message")
    turns = [_turn_of(message, at) for at, message in enumerate(messages)]
    if turns[-1].role != "assistant":
        raise _Reason(f"the last message is the {turns[-1].role}'s; expected the assistant's")
    return Conversation(tuple(turns), tools)


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise _Reason(f"{what} is {type(value).__name__}; expected a string")
    if any(0xD800 <= ord(c) < 0xE000 for c in value):
        raise _Reason(f"{what} holds half a surrogate pair")
    return value


def choose_demonstrations(
    conversations: Sequence[Conversation], demonstrations: Literal["one", "all"], seed: int
) -> list[Conversation]:
    """All of them, or of each question one, drawn with the seed: the same in every epoch, and for
    a question whatever other questions there are."""
    if demonstrations == "all":
        return list(conversations)
    by_question: dict[tuple[Turn, ...], list[Conversation]] = {}
    for conversation in conversations:
        # A text answers no question: it is its own.
        question = conversation.question or conversation.turns
        by_question.setdefault(question, []).append(conversation)
    chosen = []
    for question, found in by_question.items():
        text = json.dumps([[turn.role, turn.content] for turn in question])
        chosen.append(found[key_of(seed, "demonstration", text) % len(found)])
    return chosen
