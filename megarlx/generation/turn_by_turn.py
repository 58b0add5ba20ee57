"""Episodes and streams of a generator that can only complete prompts.

All that stands before a turn is its prompt. So every turn computes the episode so far again, where
the engine goes on with its cache; the tokens are the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from megarlx.comm.collectives import gather_values
from megarlx.generation.requests import (
    NOT_WRITTEN,
    Completion,
    NewToken,
    OnTurnsEnd,
    Request,
    SamplingSettings,
    Trajectory,
    TurnEnd,
    check_requests,
)
from megarlx.generation.stop import Detokenize
from megarlx.model.build import ParallelModel


class TurnByTurn(ABC):
    """A `Generator` of which only `generate` has to be written."""

    def __init__(
        self,
        model: ParallelModel,
        *,
        slots: int,
        longest: int,
        detokenize: Detokenize | None = None,
        prefill_tokens: int | None = None,
        cache_tokens: int | None = None,
    ) -> None:
        """`slots` and `prefill_tokens` are what may be computed at once, `cache_tokens` what may be
        kept of it, for who wants to know."""
        self.model, self.longest, self.detokenize = model, longest, detokenize
        self.slots, self.prefill_tokens = slots, prefill_tokens
        self.cache_tokens = cache_tokens
        self.device = model.pipeline.device

    def metrics(self) -> Mapping[str, float]:
        return {}

    @abstractmethod
    def generate(
        self, requests: Sequence[Request], sampling: SamplingSettings, seed: int
    ) -> list[Completion]: ...

    def stream(
        self, requests: Sequence[Request], sampling: SamplingSettings, seed: int
    ) -> Iterator[NewToken]:
        for one in self.generate(requests, sampling, seed):
            drawn = zip(one.tokens, one.logprobs, one.sampled_logprobs, strict=True)
            for left, (token, logprob, sampled) in enumerate(drawn, start=1 - len(one.tokens)):
                reason = None if left else one.finish_reason
                yield NewToken(one.sequence_id, int(token), float(logprob), float(sampled), reason)

    def episodes(
        self,
        requests: Sequence[Request],
        sampling: SamplingSettings,
        seed: int,
        on_turns_end: OnTurnsEnd | None = None,
        *,
        max_tokens: int | None = None,
    ) -> list[Trajectory]:
        most = self.longest if max_tokens is None else max_tokens
        vocab_size = self.model.config.vocab_size
        check_requests(requests, longest=self.longest, most=most, vocab_size=vocab_size)
        every = [_UnderWay(one, i, [*one.prompt]) for one in requests for i in one.sequence_ids]
        going, copy = every, self.model.mesh.model
        asked = [_turn(one, one.prompt, one.sequence_ids, most) for one in requests]
        while going:
            made = self.generate(asked, sampling, seed)
            ends = [one.take(turn, most) for one, turn in zip(going, made, strict=True)]
            if on_turns_end is None:
                break
            # the first rank of a copy of the model asks, and tells the others
            answers = gather_values([*on_turns_end(ends)] if copy.is_first else [], copy)[0]
            pairs = zip(going, answers, strict=True)
            going = [one for one, ids in pairs if ids is not None and one.inherit(ids, most)]
            asked = [_turn(one.request, one.tokens, (one.sequence_id,), most) for one in going]
        return [one.trajectory() for one in every]


def _turn(
    request: Request, tokens: Sequence[int], sequence_ids: Sequence[int], most: int
) -> Request:
    """The next turn of an episode of at most so many tokens, behind those that it has."""
    new = min(request.max_new_tokens, most - len(tokens))
    return Request(tuple(tokens), sequence_ids, new)


@dataclass
class _UnderWay:
    """An episode. `parts` of its tokens were drawn, one part in each turn."""

    request: Request
    sequence_id: int
    tokens: list[int]
    parts: list[tuple[int, Completion]] = field(default_factory=list)  # (where, what)
    full: bool = False

    def take(self, made: Completion, most: int) -> TurnEnd:
        drawn, number = made.tokens.tolist(), len(self.parts)
        self.parts.append((len(self.tokens), made))
        self.tokens += drawn
        room = max(most - len(self.tokens) - 1, 0)
        return TurnEnd(self.sequence_id, number, drawn, made.finish_reason, room)

    def inherit(self, observation: Sequence[int], most: int) -> bool:
        self.full = len(self.tokens) + len(observation) >= most
        if not self.full:
            self.tokens += observation
        return not self.full

    def trajectory(self) -> Trajectory:
        n = len(self.tokens)
        turn, logprobs = torch.full((n,), NOT_WRITTEN), torch.zeros(2, n)
        for number, (begin, made) in enumerate(self.parts):
            drawn = slice(begin, begin + len(made.tokens))
            turn[drawn] = number
            logprobs[0, drawn], logprobs[1, drawn] = made.logprobs, made.sampled_logprobs
        return Trajectory(
            self.request,
            self.sequence_id,
            torch.tensor(self.tokens),
            turn,
            logprobs[0],
            logprobs[1],
            tuple(made.finish_reason for _, made in self.parts),
            self.full,
        )
