"""The same seed gives a sequence the same tokens, whatever else is generated beside it."""

from __future__ import annotations

import random

import pytest
import torch
from generation_cases import (
    engine,
    mixed_requests,
    same_bits,
    share_that_differs,
    small_stage,
)

from megarlx.generation.requests import SamplingSettings
from megarlx.generation.widths import ladder, narrowest, rows_agree

SETTINGS = SamplingSettings(stop_tokens=(11, 60))


@pytest.mark.parametrize("family", ["olmo2", "qwen2"])
def test_same_seed_gives_same_bits_for_any_row_order_and_split_over_ranks(family: str) -> None:
    stage = small_stage(family)
    requests = mixed_requests(12, 6, new=16)
    whole = engine(stage, slots=72).generate(requests, SETTINGS, seed=8)
    shuffled = list(requests)
    random.Random(1).shuffle(shuffled)
    assert same_bits(whole, engine(stage, slots=72).generate(shuffled, SETTINGS, seed=8))
    for ranks in (2, 3):
        parts = [
            engine(stage, slots=72).generate(requests[rank::ranks], SETTINGS, seed=8)
            for rank in range(ranks)
        ]
        assert same_bits(whole, [c for part in parts for c in part])


def test_same_seed_gives_same_bits_for_any_number_of_slots_at_one_width() -> None:
    stage, requests = small_stage(), mixed_requests(6, 8)
    found = [
        engine(stage, slots=slots, one_width=True).generate(requests, SETTINGS, seed=8)
        for slots in (9, 12, 16)
    ]
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])


def test_other_widths_change_few_sequences_and_none_where_rows_agree() -> None:
    stage, requests = small_stage(), mixed_requests(12, 8)
    narrow = engine(stage, slots=16, one_width=True).generate(requests, SETTINGS, seed=8)
    wide = engine(stage, slots=96, one_width=True).generate(requests, SETTINGS, seed=8)
    assert share_that_differs(narrow, wide) <= 0.01
    if rows_agree((p.detach() for p in stage.parameters()), (16, 96, 1024)):
        assert same_bits(narrow, wide)
        assert same_bits(narrow, engine(stage, slots=96).generate(requests, SETTINGS, seed=8))


def test_another_seed_or_sequence_id_gives_other_samples() -> None:
    stage, requests = small_stage(), mixed_requests(6, 8)
    one = engine(stage).generate(requests, SETTINGS, seed=8)
    other = engine(stage).generate(requests, SETTINGS, seed=9)
    assert share_that_differs(one, other) > 0.9
    group = [c.tokens[:5].tolist() for c in one[8:16]]
    assert len({tuple(tokens) for tokens in group}) > 4


def test_rows_agree_sees_rows_that_do_not() -> None:
    """A height of 1 is a product with a vector, which sums in another order."""
    weight = torch.randn(192, 192, generator=torch.Generator().manual_seed(0))
    x = torch.randn(256, 192, generator=torch.Generator().manual_seed(0))
    really = torch.equal(torch.mm(x[:1], weight.t()), torch.mm(x, weight.t())[:1])
    assert rows_agree([weight], (1, 256)) == really
    assert rows_agree([weight], (256,))


def test_widths_are_multiples_of_16_and_waste_at_most_half_of_a_step() -> None:
    assert ladder(1) == (16,)
    assert ladder(128) == (16, 32, 48, 64, 96, 128)
    for rows in range(1, 600):
        widths = ladder(rows)
        width = narrowest(widths, rows)
        assert all(w % 16 == 0 for w in widths)
        assert rows <= width == widths[-1]
        assert width - rows < max(16, rows / 2)
    with pytest.raises(ValueError, match="slots is 0"):
        ladder(0)
