"""What a planned job is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StagePart:
    """One pipeline stage of a rank: its number of layers and what stands at its ends."""

    index: int
    layers: int
    embedding: bool
    head: bool


@dataclass(frozen=True)
class Sizes:
    """What a rank of one kind holds."""

    parameters: int  # numbers, vocabulary padding and copies included
    flat: int  # of the flat buffer, which pads between parameters
    completes_gradients: bool  # some are parts of a sum over other axes: reduced after backward


@dataclass(frozen=True)
class Held:
    """What of an optimizer a rank holds besides the master, each the size of its shard."""

    gradients: int = 1
    states: int = 2  # of update rules; AdamW has two
    locals: int = 0  # masters of objectives that take steps of their own
    exchange: int = 0  # buffers of what goes between replicas
    frozen: int = 0  # reference policies
    average: int = 0  # moving averages of the weights
    outer: int = 0  # momentum of averages, and the last average while one is made
    masks: int = 0  # a byte for each weight: which ones an objective leaves alone


@dataclass(frozen=True)
class Rollouts:
    """Generation beside training: how many sequences at once on one copy of the model."""

    slots: int
    prompt_tokens: int
    completion_tokens: int
    most_tokens: int | None = None  # what a slot has room for; absent: just these
    cache_tokens: int | None = None  # that the caches hold; absent: what all slots fill
    fp8: bool = False  # decodes with the layers' matrices rounded to e4m3

    @property
    def longest(self) -> int:
        return self.most_tokens or self.prompt_tokens + self.completion_tokens
