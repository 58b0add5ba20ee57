"""What is asked of the engine and what it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

FinishReason = Literal["stop", "length", "stop_string"]


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


class Sampled(Protocol):
    """What is made of tokens with their log-probs: a completion, or a whole episode."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def tokens(self) -> Tensor: ...
    @property
    def logprobs(self) -> Tensor: ...
    @property
    def sampled_logprobs(self) -> Tensor: ...


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
class NewToken:
    """A token as it is drawn, on the ranks that hold the last stage."""

    sequence_id: int
    token: int
    logprob: float
    sampled_logprob: float
    finish_reason: FinishReason | None


def check_requests(requests: Sequence[Request], *, longest: int, vocab_size: int) -> None:
    """Refuses what could not be finished, before anything is computed."""
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
