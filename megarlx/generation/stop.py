"""Stop strings, which may begin in one token and end in another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Detokenize = Callable[[Sequence[int]], str]


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
