"""What is asked of the engine and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

FinishReason = Literal["stop", "length", "stop_string"]
NOT_WRITTEN = -1  # a token that no turn wrote: of the prompt or an observation


@dataclass(frozen=True)
class Request:
    """A prompt, and one sequence id for each sample wanted of it.

    A sequence id keys the sampling noise: the same seed and id give the same sample of a prompt
    wherever and beside whatever it is generated.
    """

    prompt: Sequence[int]
    sequence_ids: Sequence[int]
    max_new_tokens: int
    metadata: Any = None


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn (see `megarlx.ops.sample`) and what ends a sequence."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if "" in self.stop_strings:
            raise ValueError("sampling: stop_strings holds ''; allowed: texts of 1 character up")
        for name in ("temperature", "top_p", "min_p"):  # 0 and 1 are numbers too
            object.__setattr__(self, name, float(getattr(self, name)))


@dataclass(frozen=True)
class Completion:
    """One sample. What ended it, stop token or stop string, is its last token, and is trained on.

    logprobs          under the model: temperature 1, nothing filtered
    sampled_logprobs  under the distribution that was drawn from
    """

    request: Request
    sequence_id: int
    tokens: Tensor  # int64 [n]
    logprobs: Tensor  # fp32 [n]
    sampled_logprobs: Tensor  # fp32 [n]
    finish_reason: FinishReason


@dataclass(frozen=True)
class TurnEnd:
    """A turn that is over, and what an observation may still take."""

    sequence_id: int
    turn: int  # the first is 0
    tokens: list[int]  # what was drawn, with what ended it
    reason: FinishReason  # "length": cut off by the turn's or the sequence's limit
    room: int  # most tokens of an observation that leave place for an answer


# One answer for each: the ids to go on behind, or None where the episode is over.
OnTurnsEnd = Callable[[list[TurnEnd]], Sequence[Sequence[int] | None]]


@dataclass(frozen=True)
class Trajectory:
    """All tokens of an episode, the prompt first. Log-probs are 0 where nothing was drawn."""

    request: Request
    sequence_id: int
    tokens: Tensor  # int64 [n]
    turn: Tensor  # int64 [n], which turn wrote it, or NOT_WRITTEN
    logprobs: Tensor  # fp32 [n], as in Completion
    sampled_logprobs: Tensor  # fp32 [n]
    reasons: tuple[FinishReason, ...]  # how each turn ended
    full: bool  # over because the next observation left no place for an answer

    @property
    def written(self) -> Tensor:
        return self.turn != NOT_WRITTEN

    @property
    def completion(self) -> Completion:
        """The first turn, which is all of an episode that nobody answered."""
        begin = len(self.request.prompt)
        drawn = slice(begin, begin + int((self.turn == 0).sum()))
        return Completion(
            self.request,
            self.sequence_id,
            self.tokens[drawn],
            self.logprobs[drawn],
            self.sampled_logprobs[drawn],
            self.reasons[0],
        )


@dataclass(frozen=True)
class NewToken:
    """A token as it is drawn, on the ranks that hold the last stage."""

    sequence_id: int
    token: int
    logprob: float
    sampled_logprob: float
    finish_reason: FinishReason | None


def check_requests(
    requests: Sequence[Request], *, longest: int, most: int, vocab_size: int
) -> None:
    """Refuses what could not be finished, before anything is computed. `most` are the tokens of an
    episode, whose turns may be cut off by it."""
    if not 2 <= most <= longest:
        raise ValueError(
            f"generate: max_tokens of an episode is {most}; allowed: 2 to {longest}, the engine's "
            "longest sequence"
        )
    seen: set[int] = set()
    for index, request in enumerate(requests):
        length, new = len(request.prompt), request.max_new_tokens
        where = f"generate: request {index}"
        if length == 0:
            raise ValueError(f"{where}: the prompt has 0 tokens; allowed: 1 to {longest - 1}")
        if new < 1:
            raise ValueError(f"{where}: max_new_tokens is {new}; allowed: 1 or more")
        if length + new > longest:
            raise ValueError(
                f"{where}: a prompt of {length} tokens with max_new_tokens {new} makes "
                f"{length + new}; allowed: at most {longest}, the engine's longest sequence"
            )
        if length >= most:
            raise ValueError(
                f"{where}: the prompt has {length} tokens; allowed: 1 to {most - 1}, below "
                "max_tokens of an episode"
            )
        wrong = [token for token in request.prompt if not 0 <= token < vocab_size]
        if wrong:
            raise ValueError(
                f"{where}: the prompt holds token id {wrong[0]}; allowed: 0 to {vocab_size - 1}"
            )
        for sequence_id in request.sequence_ids:
            if sequence_id in seen:
                raise ValueError(
                    f"{where}: sequence id {sequence_id} occurs twice; ids key the sampling noise "
                    "and must differ"
                )
            seen.add(sequence_id)
