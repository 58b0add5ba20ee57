"""What samples/ tells of an episode token by token: texts, log-probs, advantages.

All of them are lists of one list a turn, of the tokens that the policy wrote. Together the texts
of a turn's tokens are what it wrote, with what ended it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megarlx.generation.text import pieces_of
from megarlx.rollouts.episodes import Episode

DIGITS = 4  # behind the point


def tokens_of(episode: Episode, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """Its group, its tokens with their log-probs under the policy, and what was seen between its
    turns."""
    found: dict[str, Any] = {"group": episode.group}
    made = episode.trajectory
    if made is not None:
        turns = [made.turn == number for number in range(len(made.reasons))]
        found["tokens"] = [pieces_of(made.tokens[turn].tolist(), decode) for turn in turns]
        found["logprobs"] = [_short(made.logprobs[turn]) for turn in turns]
    if len(episode.turns) > 1:
        found["seen"] = [turn.observation for turn in episode.turns[1:]]
    return found


def advantages_of(example: dict[str, Any], values: Tensor) -> dict[str, Any]:
    """The example with the advantage that it was trained with: `values` has one of the sequence, or
    one for each token that the policy wrote."""
    if len(values) == 1:
        return {**example, "advantage": _short(values)[0]}
    lengths = [len(turn) for turn in example["tokens"]]
    return {**example, "advantages": [_short(part) for part in values.split(lengths)]}


def _short(values: Tensor) -> list[float | None]:
    """JSON has no NaN."""
    rounded = torch.as_tensor(values, dtype=torch.float64).tolist()
    return [round(value, DIGITS) if math.isfinite(value) else None for value in rounded]
