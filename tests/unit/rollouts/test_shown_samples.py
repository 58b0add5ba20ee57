"""samples/ tells tokens, log-probs and advantages of what was trained on."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarlx.data.tokenizer import ByteTokenizer, WordTokenizer
from megarlx.generation.requests import NOT_WRITTEN
from megarlx.generation.text import pieces_of
from megarlx.rollouts.completions import Completions
from megarlx.rollouts.rollout import Example, Rollout
from megarlx.rollouts.shown import tokens_of

BYTES = ByteTokenizer()
WORDS = WordTokenizer(["ann", "has", "7", "books"])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 270), max_size=60))
def test_the_pieces_of_any_bytes_are_their_text(ids: list[int]) -> None:
    """Broken characters and ids without text too."""
    pieces = pieces_of(ids, BYTES.decode_sampled)
    assert len(pieces) == len(ids)
    whole = BYTES.decode_sampled(ids)
    assert "".join(pieces).replace("\ufffd", "") == whole.replace("\ufffd", "")


@given(st.text(max_size=40))
def test_the_pieces_of_a_text_are_the_text(text: str) -> None:
    ids = BYTES.encode(text)
    pieces = pieces_of(ids, BYTES.decode_sampled)
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece] == list(text)


def test_words_are_pieces_with_what_stands_between_them() -> None:
    ids = WORDS.encode("ann has 7 books")
    assert pieces_of(ids, WORDS.decode_sampled) == ["ann", " has", " 7", " books"]


def test_pieces_cost_as_many_decoded_tokens_as_there_are_tokens() -> None:
    decoded = []

    def decode(ids: Any) -> str:
        decoded.append(len(ids))
        return BYTES.decode_sampled(ids)

    pieces_of(BYTES.encode("ä" * 500), decode)
    assert sum(decoded) < 8 * 1000


def episode(turns: list[list[int]]) -> Any:
    """Turns of bytes, with an observation between them."""
    tokens, turn = [65, 65], [NOT_WRITTEN] * 2
    for number, ids in enumerate(turns):
        tokens += [*ids, 66]
        turn += [number] * len(ids) + [NOT_WRITTEN]
    trajectory = SimpleNamespace(
        tokens=torch.tensor(tokens),
        turn=torch.tensor(turn),
        logprobs=-torch.arange(len(tokens)) / 8,
        reasons=("stop",) * len(turns),
    )
    seen = [SimpleNamespace(observation=f"saw {n}") for n in range(len(turns))]
    return SimpleNamespace(group=3, trajectory=trajectory, turns=tuple(seen))


def test_an_episode_tells_each_turn_apart() -> None:
    found = tokens_of(episode([[97, 98], [99]]), BYTES.decode_sampled)
    assert found == {
        "group": 3,
        "tokens": [["a", "b"], ["c"]],
        "logprobs": [[-0.25, -0.375], [-0.625]],
        "seen": ["saw 1"],
    }
    one = tokens_of(episode([[97]]), BYTES.decode_sampled)
    assert "seen" not in one


def test_an_episode_that_never_began_has_no_tokens() -> None:
    lost = SimpleNamespace(group=1, trajectory=None, turns=())
    assert tokens_of(lost, BYTES.decode_sampled) == {"group": 1}  # type: ignore[arg-type]


def rollout(advantages: torch.Tensor) -> Rollout:
    """Two sequences, the second of two turns with an observation between; of prompts 5 and 8, of
    whose samples places 1 and 0 were kept."""
    written = torch.tensor([0, 1, 1, 0, 1, 0, 1, 1], dtype=torch.bool)
    made = Completions(torch.zeros(8, dtype=torch.int64), torch.tensor([3, 5]), written)
    examples = [
        Example({"tokens": [["a", "b"]]}, 5, 1),
        Example({"tokens": [["c"], ["d", "e"]]}, 8, 0),
        Example({"tokens": [["f"]]}, 8, 1),
    ]
    groups = torch.tensor([0, 1])
    rewards = torch.zeros(2, 2, dtype=torch.float64)
    return Rollout(made, rewards, advantages, groups, {(5, 1): 0, (8, 0): 1}, {}, examples)


def test_examples_have_the_advantage_they_were_trained_with() -> None:
    found = rollout(torch.tensor([1.5, math.nan])).shown()
    assert [one.get("advantage", "none") for one in found] == [1.5, None, "none"]
    of_tokens = rollout(torch.arange(8.0)).shown()
    assert [one.get("advantages") for one in of_tokens] == [[[1.0, 2.0]], [[4.0], [6.0, 7.0]], None]


@pytest.mark.parametrize("advantages", [torch.tensor([0.1, -0.1]), torch.rand(8)])
def test_what_is_shown_is_json(advantages: torch.Tensor) -> None:
    json.dumps(rollout(advantages).shown(), allow_nan=False)
