"""Another generator than the engine, named as this module's class."""

from __future__ import annotations

from collections.abc import Sequence

from megarlx.generation.engine import Engine
from megarlx.generation.requests import Completion, Request, SamplingSettings
from megarlx.generation.turn_by_turn import TurnByTurn

asked: list[int] = []  # requests of each call


class Counting(TurnByTurn):
    def generate(
        self, requests: Sequence[Request], sampling: SamplingSettings, seed: int
    ) -> list[Completion]:
        asked.append(len(requests))
        options = {"slots": self.slots, "longest": self.longest, "detokenize": self.detokenize}
        return Engine.of(self.model, **options).generate(requests, sampling, seed)
