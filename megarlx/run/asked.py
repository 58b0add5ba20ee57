"""A file of prompts, each asked by itself: a line of JSON with the answers for each of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from typing import Any

from megarlx.data.conversations import turns_of
from megarlx.data.documents import BadLineError, lines
from megarlx.run.conversation import Drawing
from megarlx.run.opened import OpenedRun

Asked = str | list[dict[str, Any]]
SAMPLES_AT_ONCE = 256
EXPECTED = (
    'expected a text, {"prompt": text}, {"question": text}, or {"messages": [{"role", "content"}, '
    "…]} whose last is the user's, or a tool's"
)


def answer_all(run: OpenedRun, path: str, drawing: Drawing, *, plain: bool) -> None:
    """Prints {"prompt" or "messages": …, "answers": [text, …]} for each."""
    count, number = drawing.samples, 0
    asked, at_once = read_asked(path), max(1, SAMPLES_AT_ONCE // count)
    while part := list(islice(asked, at_once)):
        for most, alike in groupby(part, lambda one: _most(run, one, drawing, plain)):
            same = list(alike)
            every = run.generate(
                same,
                samples=count,
                temperature=drawing.temperature,
                top_p=drawing.top_p,
                max_new_tokens=most,
                seed=drawing.seed,
                number=number,
                raw=plain,
                generator=drawing.generator,
            )
            number += count * len(same)
            for one, answers in zip(same, every, strict=True):
                key = "prompt" if isinstance(one, str) else "messages"
                print(json.dumps({key: one, "answers": answers}), flush=True)


def _most(run: OpenedRun, prompt: Asked, drawing: Drawing, plain: bool) -> int:
    """Tokens of an answer: as many as are wanted, or as the model has room for."""
    given = len(run.prompt_ids(prompt, raw=plain))
    left = run.config.model.max_sequence_length - given
    return min(drawing.max_new_tokens, left) if left > 0 else drawing.max_new_tokens


def read_asked(path: str) -> Iterator[Asked]:
    """The prompts of a file: lines of text, or of JSON where its name says .jsonl. `-` is standard
    input, lines of text."""
    as_json = ".jsonl" in path
    found: Iterable[bytes] = sys.stdin.buffer if path == "-" else lines(path)
    for number, line in enumerate(found, 1):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8").rstrip("\r\n")
            yield _said(json.loads(text)) if as_json else text
        except (ValueError, RecursionError) as error:
            raise BadLineError(path, number, str(error)) from None


def _said(value: Any) -> Asked:
    if isinstance(value, dict):
        value = value.get("messages", value.get("prompt", value.get("question")))
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value and turns_of(value)[-1].role in ("user", "tool"):
        return value
    raise ValueError(EXPECTED)
