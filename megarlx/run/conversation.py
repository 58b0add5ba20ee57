"""What was said to a model and what it answered, for as long as the model has room for it."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

from megarlx.data.conversations import Turn, turns_of
from megarlx.generation.text import TextPiece
from megarlx.run.opened import OpenedRun

ROOM = 512  # tokens of an answer, where nothing else is said


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn."""

    samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = ROOM
    seed: int = 0
    generator: str = "engine"


@dataclass
class Conversation:
    """With a template every question stands behind the turns before it; without one each text is
    given alone, and the model goes on with it."""

    run: OpenedRun
    drawing: Drawing
    plain: bool  # no template, or none wanted
    system: str = ""
    turns: list[Turn] = field(default_factory=list)  # questions and the answers that were taken
    answers: list[str] = field(default_factory=list)  # samples of the last question
    forgotten: int = 0  # turns for which there was no more room, of the last question
    _drawn: int = 0  # samples so far: each is another one

    def ask(self, question: str) -> Generator[tuple[int, TextPiece], None, None]:
        """Pieces of the answers as they are drawn, each behind the answer's place. What has been
        drawn when this is closed stays as the answers, of which the first is taken."""
        return self._ask(self.turns, question)

    def again(self) -> Generator[tuple[int, TextPiece], None, None]:
        """Other answers to the last question."""
        *before, question, _ = self.turns
        return self._ask(before, question.content)

    def _ask(
        self, before: list[Turn], question: str
    ) -> Generator[tuple[int, TextPiece], None, None]:
        asked = [*before, *turns_of([{"role": "user", "content": question}])]
        prompt = question if self.plain else self._that_fit(asked)
        count = self.drawing.samples
        first, self._drawn = self._drawn, self._drawn + count
        pieces = self.run.stream_samples(
            prompt,
            range(first, first + count),
            temperature=self.drawing.temperature,
            top_p=self.drawing.top_p,
            max_new_tokens=self._room(prompt),
            seed=self.drawing.seed,
            raw=self.plain,
            generator=self.drawing.generator,
        )
        answers = [""] * count
        for number, piece in pieces:
            answers[number - first] += piece.text
            self.answers, self.turns = answers, [*asked, Turn("assistant", answers[0])]
            yield number - first, piece

    def take(self, place: int) -> None:
        """The answer that the conversation goes on from."""
        self.turns[-1] = Turn("assistant", self.answers[place])

    def begin_anew(self) -> None:
        self.turns, self.answers, self.forgotten = [], [], 0

    def _that_fit(self, turns: list[Turn]) -> list[Turn]:
        """The newest of the turns, without the oldest questions and answers where these leave no
        room for an answer."""
        before = [Turn("system", self.system)] if self.system else []
        kept = list(turns)
        while len(kept) > 1 and self._left([*before, *kept]) < self._wanted:
            del kept[:2]
        self.forgotten = len(turns) - len(kept)
        return [*before, *kept]

    @property
    def _wanted(self) -> int:
        """Tokens that are kept free for an answer, at most a quarter of what the model can take."""
        return min(self.drawing.max_new_tokens, self.run.config.model.max_sequence_length // 4)

    def _left(self, prompt: str | list[Turn]) -> int:
        ids = self.run.prompt_ids(prompt, raw=self.plain)
        return self.run.config.model.max_sequence_length - len(ids)

    def _room(self, prompt: str | list[Turn]) -> int | None:
        """None where there is none, so that the refusal says how much there would be."""
        left = self._left(prompt)
        return min(self.drawing.max_new_tokens, left) if left > 0 else None
