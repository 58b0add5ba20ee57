"""Prompts for reinforcement learning: questions with reference answers, drawn epoch after epoch.

A file holds one prompt a line, {"question": …, "answer": …}; in place of the question a "prompt",
or "messages" of which the last is the user's. Other fields go to the rewards as metadata. Which
prompt is drawn when is a function of the seed and of how many were drawn before; by difficulty,
also of how those were solved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megarlx.data.conversations import (
    Conversation,
    ConversationError,
    Template,
    Turn,
    turns_of,
    with_numbers,
)
from megarlx.data.difficulty import Difficulty
from megarlx.data.documents import BadLineError, lines
from megarlx.data.order import key_of, shuffled
from megarlx.data.tokenizer import Tokenizer


class PromptError(ValueError):
    """Prompts that cannot be used."""


@dataclass(frozen=True)
class Prompt:
    question: str
    answer: str | None = None  # what rewards compare with; some need none
    metadata: dict[str, Any] = field(default_factory=dict)
    before: tuple[Turn, ...] = ()  # turns that the question follows, as a system's

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (*self.before, Turn("user", self.question))


@dataclass(frozen=True)
class PromptKeys:
    """Names of the fields of a line."""

    question: str = "question"
    answer: str = "answer"
    needs_question: bool = True  # an environment says by itself how a task begins


@dataclass(frozen=True)
class FewShot:
    """Solved examples before each question, for models that have not been trained to answer.

    `separator` stands behind each example; without one, the token that ends a document does.
    """

    examples: tuple[Conversation, ...] = ()
    separator: str | None = "\n\n"

    def ids(self, template: Template, tokenizer: Tokenizer) -> list[int]:
        found: list[int] = []
        for example in self.examples:
            found += template.example_ids(example, tokenizer, self.separator, first=not found)
        return found


@dataclass(frozen=True)
class Drawn:
    """A prompt that was drawn; `number` counts the draws of the whole run."""

    number: int
    place: int  # among the prompts
    prompt: Prompt
    ids: tuple[int, ...]


def read_prompts(
    path: str | Path,
    keys: PromptKeys | None = None,
    on_bad_line: Literal["stop", "skip"] = "stop",
    skipped: list[BadLineError] | None = None,
) -> list[Prompt]:
    """The prompts of a JSONL file (also .gz, .zst) in order. Bad lines stop, or are appended to
    `skipped`."""
    keys = keys or PromptKeys()
    prompts = []
    for number, line in enumerate(lines(str(path)), start=1):
        if not line.strip():
            continue
        found = _prompt(line, keys)
        if isinstance(found, Prompt):
            prompts.append(found)
            continue
        bad = BadLineError(str(path), number, found)
        if on_bad_line == "stop":
            raise bad
        if skipped is not None:
            skipped.append(bad)
    _check_answers(str(path), keys, prompts)
    return prompts


def _check_answers(path: str, keys: PromptKeys, prompts: Sequence[Prompt]) -> None:
    """Some rewards need no reference; who names a key of it has one."""
    named = keys.answer != PromptKeys.answer
    if named and prompts and all(prompt.answer is None for prompt in prompts):
        others = ", ".join(prompts[0].metadata) or "none"
        raise PromptError(
            f"{path}: answer_key is {keys.answer!r}, and no line has it (other keys of the first: "
            f"{others})"
        )


def _prompt(line: bytes, keys: PromptKeys) -> Prompt | str:
    """The prompt, or why there is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    if not isinstance(value, dict):
        return f"holds a {type(value).__name__}; expected an object"
    return prompt_of(value, keys)


def prompt_of(value: dict[str, Any], keys: PromptKeys) -> Prompt | str:
    """The prompt of a line's value, or why there is none; what is left of the value is metadata."""
    if not keys.needs_question and keys.question not in value:
        return Prompt("", None, value)
    its_keys, key = ", ".join(value) or "none", _question_key(value, keys)
    question, answer = value.pop(key, None), value.pop(keys.answer, None)
    before: Sequence[Turn] = ()
    if isinstance(question, list) and question:
        try:
            *before, last = turns_of(question)
        except ConversationError as error:
            return f"'{key}': {error}"
        if last.role != "user":
            return f"'{key}' ends in a turn of the {last.role}; expected the user's"
        question = last.content
    if not isinstance(question, str) or not question.strip():
        return (
            f"'{key}' is {question!r}; expected text, or messages (its keys: {its_keys}); "
            "question_key and answer_key name others"
        )
    answer = with_numbers(answer)
    if answer is not None and not isinstance(answer, str):
        return f"'{keys.answer}' is {answer!r}; expected text, a number, or nothing"
    for name, text in ((key, question), (keys.answer, answer or "")):
        if any(0xD800 <= ord(c) < 0xE000 for c in text):
            return f"'{name}' holds half a surrogate pair"
    return Prompt(question, answer, value, tuple(before))


def _question_key(value: Mapping[str, Any], keys: PromptKeys) -> str:
    """What is said to be it; where nothing is said, also what others call it."""
    usual = (keys.question, "prompt", "messages")
    names = usual if keys.question == PromptKeys.question else usual[:1]
    return next((name for name in names if name in value), keys.question)


class PromptData:
    """Prompts in a seeded order, another in each epoch. The state is how many were drawn.

    By difficulty they have no order, and the state also holds how prompts were solved.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        template: Template,
        tokenizer: Tokenizer,
        seed: int,
        *,
        few_shot: FewShot | None = None,
        max_prompt_tokens: int | None = None,
        too_long: Literal["stop", "skip"] = "stop",
        by_difficulty: tuple[float, float] | None = None,  # floor, decay: see difficulty.py
        name: str = "rl",
    ) -> None:
        self.seed, self.name, self.drawn = seed, name, 0
        shots = (few_shot or FewShot()).ids(template, tokenizer)
        self.prompts: list[Prompt] = []
        self.too_long = 0
        self._ids: list[tuple[int, ...]] = []
        for prompt in prompts:
            ids = list(shots)
            if prompt.question:  # an environment says by itself how its task begins
                ids += template.prompt_ids(prompt.turns, tokenizer, follows=bool(shots))
            if max_prompt_tokens is not None and len(ids) > max_prompt_tokens:
                if too_long == "stop":
                    raise PromptError(
                        f"{name}: the prompt {prompt.question[:80]!r} has {len(ids)} tokens; "
                        f"it may have {max_prompt_tokens}: what {name}.max_prompt_tokens says, or "
                        f"what the model's longest sequence leaves; {name}.too_long = 'skip' "
                        "leaves such prompts out"
                    )
                self.too_long += 1
                continue
            self.prompts.append(prompt)
            self._ids.append(tuple(ids))
        if not self.prompts:
            raise PromptError(f"{name}: no prompt to draw ({self.too_long} were too long)")
        content = hashlib.sha256()
        for kept, prompt in zip(self._ids, self.prompts, strict=True):
            told = {key: one for key, one in asdict(prompt).items() if key != "before"}
            content.update(json.dumps([kept, told], sort_keys=True).encode())
        self._fingerprint = {
            "prompts": len(self.prompts),
            "content": content.hexdigest(),
            "seed": seed,
            "name": name,
        }
        self.difficulty: Difficulty | None = None
        if by_difficulty is not None:
            self.difficulty = Difficulty(len(self.prompts), seed, name, *by_difficulty)
            self._fingerprint["draw"] = "difficulty"
        self._order: tuple[int, list[int]] = (-1, [])  # of one epoch

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self._ids))

    def take(self, count: int) -> list[Drawn]:
        """The next prompts; the same on every rank that has drawn as many."""
        numbers = range(self.drawn, self.drawn + count)
        if self.difficulty is None:
            places = [self._at(number) for number in numbers]
        else:
            places = self.difficulty.places(self.drawn, count)
        self.drawn += count
        return [
            Drawn(number, at, self.prompts[at], self._ids[at])
            for number, at in zip(numbers, places, strict=True)
        ]

    def _at(self, number: int) -> int:
        epoch, place = divmod(number, len(self.prompts))
        if self._order[0] != epoch:
            order = shuffled(len(self.prompts), key_of(self.seed, self.name, epoch))
            self._order = (epoch, order.tolist())
        return self._order[1][place]

    def state(self) -> dict[str, Any]:
        state = {"drawn_prompts": self.drawn, "dataset": dict(self._fingerprint)}
        return state if self.difficulty is None else {**state, "solved": self.difficulty.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken; refuses prompts that are not the same."""
        saved, now = state["dataset"], self._fingerprint
        changed = [
            f"{key} was {saved.get(key)}, is {now.get(key)}"
            for key in sorted({*saved, *now})
            if saved.get(key) != now.get(key)
        ]
        if changed:
            raise PromptError(
                f"{self.name}: the prompts are not what the run was saved with:\n  "
                + "\n  ".join(changed)
            )
        self.drawn = int(state["drawn_prompts"])
        if self.difficulty is not None:
            self.difficulty.load_state(state["solved"])
