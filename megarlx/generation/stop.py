"""What a completion says, and stop strings, which may begin in one token and end in another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megarlx.generation.requests import SamplingSettings

Detokenize = Callable[[Sequence[int]], str]


def text_of(tokens: Sequence[int], sampling: SamplingSettings, detokenize: Detokenize) -> str:
    """The text of a completion or a turn, for rewards, environments and people alike: without the
    token that ended it, and up to the first stop string."""
    said = tokens[:-1] if len(tokens) and tokens[-1] in sampling.stop_tokens else tokens
    text = detokenize(said)
    ends = [at for stop in sampling.stop_strings if (at := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]


class StopStrings:
    """Looks for texts at the end of a growing sequence of tokens."""

    def __init__(self, texts: Sequence[str], detokenize: Detokenize | None) -> None:
        if texts and detokenize is None:
            raise ValueError(
                f"generate: stop_strings are {list(texts)}, but the engine was given no "
                "detokenize function to see text with"
            )
        self.texts, self.detokenize = tuple(texts), detokenize
        self.longest = max(map(len, texts), default=0)

    def __bool__(self) -> bool:
        return bool(self.texts)

    def reached(self, tokens: Sequence[int]) -> bool:
        """Whether the last token completed a stop string. Called after every token."""
        assert self.detokenize is not None
        # Enough last tokens that a stop string ending in the newest one lies within their text:
        # a token may well be no text at all, or a part of a character.
        count = self.longest + 4
        while True:
            text = self.detokenize(tokens[-count:])
            if count >= len(tokens) or len(text) >= 2 * self.longest + 4:
                return any(stop in text for stop in self.texts)
            count *= 2
