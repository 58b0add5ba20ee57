"""Text in, text out as it is drawn: what `megarlx generate` prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megarlx.generation.interface import Generator
from megarlx.generation.requests import FinishReason, Request, SamplingSettings

INCOMPLETE = "\ufffd"  # what a tokenizer makes of the first bytes of a character


@dataclass(frozen=True)
class TextPiece:
    """A drawn token, and the text that is certain with it ('' inside of a character)."""

    text: str
    token: int
    logprob: float
    finish_reason: FinishReason | None


def stream_text(
    generator: Generator,
    prompt: str,
    *,
    encode: Callable[[str], Sequence[int]],
    decode: Callable[[Sequence[int]], str],
    sampling: SamplingSettings,
    max_new_tokens: int,
    seed: int = 0,
    sequence_id: int = 0,
) -> Iterator[TextPiece]:
    """One completion of the prompt, piece by piece; another one for each sequence id."""
    request = Request(encode(prompt), (sequence_id,), max_new_tokens)
    tokens: list[int] = []
    shown = ""
    for new in generator.stream([request], sampling, seed):
        tokens.append(new.token)
        text = decode(tokens)
        if new.finish_reason is None and text.endswith(INCOMPLETE):
            text = shown
        yield TextPiece(text[len(shown) :], new.token, new.logprob, new.finish_reason)
        shown = text
