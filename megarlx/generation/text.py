"""Text as it is drawn: what `megarlx generate` and `megarlx chat` print."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megarlx.generation.interface import Generator
from megarlx.generation.requests import FinishReason, Request, SamplingSettings

INCOMPLETE = "\ufffd"  # what a tokenizer makes of the first bytes of a character

MOST_HELD = 64  # tokens that wait for the end of a character; nonsense is shown then


@dataclass(frozen=True)
class TextPiece:
    """A drawn token, and the text that is certain with it ('' inside of a character)."""

    text: str
    token: int
    logprob: float
    finish_reason: FinishReason | None


def stream_texts(
    generator: Generator,
    request: Request,
    *,
    decode: Callable[[Sequence[int]], str],
    sampling: SamplingSettings,
    seed: int = 0,
) -> Iterator[tuple[int, TextPiece]]:
    """The samples of a request as they grow, each piece behind its sequence id."""
    tokens: dict[int, list[int]] = {number: [] for number in request.sequence_ids}
    shown = dict.fromkeys(request.sequence_ids, "")
    for new in generator.stream([request], sampling, seed):
        number = new.sequence_id
        tokens[number].append(new.token)
        text = decode(tokens[number])
        if new.finish_reason is None and text.endswith(INCOMPLETE):
            text = shown[number]
        certain = text[len(shown[number]) :]
        shown[number] = text
        yield number, TextPiece(certain, new.token, new.logprob, new.finish_reason)


def pieces_of(tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text that is certain with each token ('' inside of a character). Only a few tokens are
    decoded at once: those before a token may change how it is written."""
    pieces: list[str] = []
    begin = read = 0  # tokens[begin:read] are what stands before the next piece
    shown = 0  # characters of the text of tokens[begin:]
    for end in range(1, len(tokens) + 1):
        text = decode(tokens[begin:end])
        whole = text.rstrip(INCOMPLETE)
        if end == len(tokens) or end - read == MOST_HELD:
            whole = text
        pieces.append(whole[shown:])
        shown = max(shown, len(whole))
        if len(whole) == len(text):
            begin, read = read, end
            shown = len(decode(tokens[begin:read]))
    return pieces
