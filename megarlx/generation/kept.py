"""What a generation leaves: finished sequences, and what was computed for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megarlx.generation import rows as decoding
from megarlx.generation.requests import NOT_WRITTEN, Completion, Trajectory
from megarlx.generation.scheduler import Turns


@dataclass
class Counts:
    """What a generation computed on this rank."""

    prompts_prefilled: int = 0
    tokens_prefilled: int = 0  # padding not counted
    tokens_padded: int = 0  # of prefills
    steps: int = 0
    tokens_decoded: int = 0
    rows_padded: int = 0  # of decode steps
    tokens_observed: int = 0  # of observations, prefilled or fed in decode steps
    places_held: int = 0  # of the caches, at most: what pages held there was room for


@dataclass(frozen=True)
class Kept:
    """A finished sequence of n tokens, as its slot held it: only what was drawn or observed."""

    sequence: decoding.Sequence
    turns: Turns
    tokens: np.ndarray  # [n]
    logprobs: Tensor  # [2, n], under the model and under what was drawn from

    def trajectory(self) -> Trajectory:
        request, n = self.sequence.request, len(self.tokens)
        turn, logprobs = torch.full((n,), NOT_WRITTEN), torch.zeros(2, n)
        for number, (begin, end) in enumerate(self.turns.spans):
            turn[begin:end] = number
            logprobs[:, begin:end] = self.logprobs[:, begin:end]
        self.tokens[: len(request.prompt)] = request.prompt
        return Trajectory(
            request,
            self.sequence.sequence_id,
            torch.from_numpy(self.tokens),
            turn,
            logprobs[0],
            logprobs[1],
            tuple(self.turns.reasons),
            self.turns.full,
        )

    def completion(self) -> Completion:
        """The first turn, which is all of a sequence that nobody answered."""
        begin, end = self.turns.spans[0]
        return Completion(
            self.sequence.request,
            self.sequence.sequence_id,
            torch.from_numpy(self.tokens[begin:end]),
            self.logprobs[0, begin:end],
            self.logprobs[1, begin:end],
            self.turns.reasons[0],
        )
