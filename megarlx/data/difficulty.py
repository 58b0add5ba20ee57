"""Prompts drawn by how much their groups may teach: most often those that are half solved.

A prompt is drawn with the weight p (1 - p) + floor. p is a running mean of the share of its samples
that were right, ½ before the first. A draw is a function of the seed, its number and the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from megarlx.data.order import uniform

NEW = 0.5  # p of a prompt that was not drawn yet


class Difficulty:
    def __init__(self, prompts: int, seed: int, name: str, floor: float, decay: float) -> None:
        self.prompts, self.floor, self.decay = prompts, floor, decay
        self._seed, self._name = seed, name
        self._solved: dict[int, float] = {}  # p, of prompts that were tried

    def weights(self) -> np.ndarray:
        """fp64 [prompts]; they do not sum to 1."""
        p = np.full(self.prompts, NEW)
        p[list(self._solved)] = list(self._solved.values())
        return p * (1 - p) + self.floor

    def places(self, first: int, count: int) -> list[int]:
        """Which prompts the draws from number `first` on are; one may come more than once."""
        ends = self.weights().cumsum()
        numbers = range(first, first + count)
        drawn = np.array([uniform(self._seed, self._name, "difficulty", one) for one in numbers])
        return np.searchsorted(ends[:-1], drawn * ends[-1], side="right").tolist()

    def learn(self, solved: Iterable[tuple[int, float]]) -> None:
        """(place, share of its samples that were right) of draws, in their order."""
        for place, share in solved:
            before = self._solved.get(place, NEW)
            self._solved[place] = self.decay * before + (1 - self.decay) * share

    def state(self) -> dict[str, Any]:
        return {str(place): p for place, p in self._solved.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._solved = {int(place): float(p) for place, p in state.items()}
