"""Sampling over a vocabulary that is split across processes. B rows, V vocabulary ids."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megarlx.comm.groups import Mesh
from megarlx.ops import sample

REAL = 900  # of 1024 ids


def inputs() -> tuple[Tensor, Tensor]:
    logits = torch.randn(32, 1024, generator=torch.Generator().manual_seed(0)) * 3
    logits[3, 40] = float("nan")
    logits[4, :600] = float("-inf")
    return logits, torch.stack([torch.arange(32), torch.full((32,), 9)], 1)


def sampled_in_a_group(shards: int, options: dict) -> tuple[list[list[float]], int]:
    mesh = Mesh.build(pp=1, replica=1, dp=1, tp=shards, timeout_seconds=20, backend="gloo")
    logits, keys = inputs()
    own = logits.chunk(shards, dim=1)[mesh.tp.rank]
    got = sample(own, seed=4, keys=keys, group=mesh.tp, vocab_size=REAL, **options)
    sent = mesh.tp.traffic.bytes_on("tp")
    return [t.nan_to_num(7.0).tolist() for t in got], sent


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"temperature": 0.0}, {"top_k": 20, "top_p": 0.9}]
)
def test_every_rank_gets_the_token_of_the_whole_row(
    run: Callable, shards: int, options: dict
) -> None:
    logits, keys = inputs()
    whole = sample(logits, seed=4, keys=keys, vocab_size=REAL, **options)
    expected = [t.nan_to_num(7.0).tolist() for t in whole]
    for got, sent in run(shards, sampled_in_a_group, shards, options):
        assert got == expected
        if "top_k" not in options:  # 13 words of 64 bits a row and rank, never the logits
            assert sent == (shards - 1) * 32 * 13 * 8


def slice_of_wrong_width() -> str:
    mesh = Mesh.build(pp=1, replica=1, dp=1, tp=2, timeout_seconds=20, backend="gloo")
    try:
        sample(torch.zeros(2, 100), seed=1, keys=torch.zeros(2, 2).long(), group=mesh.tp)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def test_a_slice_off_the_tile_edges_is_refused_on_every_rank(run: Callable) -> None:
    for message in run(2, slice_of_wrong_width):
        assert "megarlx.sample: the vocabulary slice of logits is 100" in message
