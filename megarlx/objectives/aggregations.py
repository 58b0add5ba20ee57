"""How much a token counts, and what the sum over all tokens is divided by.

An aggregation is (counts, sequence, c) -> (token_weights, sequence_weights), known before any loss
is: `counts` fp64 [N] are the learned tokens of each sequence, `sequence` int64 [T] is each token's.
A token's loss is multiplied by its weight [T] (None: by 1), and the sum over all ranks divided by
the sum of all sequence weights [N].

Letters: N sequences, T tokens of all of them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

Weights = tuple[Tensor | None, Tensor]


def token_mean(counts: Tensor, sequence: Tensor, c: Any) -> Weights:
    return None, counts


def sequence_mean(counts: Tensor, sequence: Tensor, c: Any) -> Weights:
    return (1 / counts.clamp_min(1))[sequence], _learned(counts)


def sequence_sum(counts: Tensor, sequence: Tensor, c: Any) -> Weights:
    return None, _learned(counts)


def sequence_sum_fixed(counts: Tensor, sequence: Tensor, c: Any) -> Weights:
    """By the longest length allowed, whatever a sequence's own is."""
    weight = counts.new_full(sequence.shape, 1 / c.max_completion_tokens)
    return weight, _learned(counts)


def _learned(counts: Tensor) -> Tensor:
    """1 for sequences that are learned from."""
    return (counts > 0).to(counts.dtype)
