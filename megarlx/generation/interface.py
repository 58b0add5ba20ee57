"""What draws tokens from the weights that are trained. The engine is one; another needs a file.

A name of a generator stands for a class, or a function, that is called as `generator_of` does. What
it makes reads the model's weights anew at each call. All ranks of a copy of the model call a method
together, with the same requests, and all return the same. turn_by_turn.py makes episodes and
streams of a `generate` alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch

from megarlx import plug
from megarlx.generation.requests import (
    Completion,
    NewToken,
    OnTurnsEnd,
    Request,
    SamplingSettings,
    Trajectory,
)
from megarlx.generation.stop import Detokenize
from megarlx.model.build import ParallelModel


class Generator(Protocol):
    """The same seed and sequence id give the same sample of a prompt, whatever is beside it."""

    longest: int  # most tokens of a sequence, its prompt included
    device: torch.device  # of the weights

    def generate(
        self, requests: Sequence[Request], sampling: SamplingSettings, seed: int
    ) -> list[Completion]:
        """One completion for each sequence id of each request, in that order."""
        ...

    def stream(
        self, requests: Sequence[Request], sampling: SamplingSettings, seed: int
    ) -> Iterator[NewToken]:
        """Every token as soon as it is drawn, on the ranks that hold the last stage."""
        ...

    def episodes(
        self,
        requests: Sequence[Request],
        sampling: SamplingSettings,
        seed: int,
        on_turns_end: OnTurnsEnd | None = None,
        *,
        max_tokens: int | None = None,
    ) -> list[Trajectory]:
        """One trajectory for each sequence id of each request, in that order.

        A request's `max_new_tokens` are those of one turn. What ends a turn does not end the
        sequence: `on_turns_end` answers with an observation or with the end. Only the first rank of
        a copy of the model needs it and calls it. None on all ranks: every episode has one turn.

        max_tokens   of a whole episode, the prompt included; by default `longest`
        """
        ...

    def metrics(self) -> Mapping[str, float]:
        """What RL logs as perf/NAME, of this rank's last call; of ranks the most is logged."""
        ...


def generator_of(
    name: str,
    model: ParallelModel,
    *,
    slots: int,
    longest: int,
    detokenize: Detokenize | None = None,
    prefill_tokens: int | None = None,
    cache_tokens: int | None = None,
) -> Generator:
    """slots           sequences at once
    longest         tokens of a sequence
    detokenize      for stop strings
    prefill_tokens  of prompts at once; None: as the generator thinks best
    cache_tokens    whose keys and values are kept; None: those of all slots at their longest
    """
    made: Generator = plug.resolve("generator", name)(
        model,
        slots=slots,
        longest=longest,
        detokenize=detokenize,
        prefill_tokens=prefill_tokens,
        cache_tokens=cache_tokens,
    )
    return made
