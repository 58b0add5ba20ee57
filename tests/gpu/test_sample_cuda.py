"""Sampling on a CUDA device against the CPU. B rows, V vocabulary ids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megarlx.ops import sample

pytestmark = pytest.mark.gpu
FILTERS: list[dict] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_k": 4000},
    {"top_p": 0.9, "temperature": 0.8},
    {"min_p": 0.02},
    {"top_k": 40, "top_p": 0.7, "min_p": 0.05, "temperature": 1.3},
]


def keys_of(rows: int) -> Tensor:
    return torch.stack([torch.arange(rows), torch.full((rows,), 3)], 1)


@pytest.mark.parametrize("size", [1, 7, 97, 129, 330, 5003, 50257, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", FILTERS)
def test_tokens_and_logprobs_equal_the_cpu(
    card: Any, size: int, dtype: torch.dtype, options: dict
) -> None:
    rows = card.size(64, max(2, min(64, 30_000 // size)))
    logits = (torch.randn(rows, size, generator=torch.Generator().manual_seed(size)) * 3).to(dtype)
    here = sample(logits, seed=5, keys=keys_of(rows), **options)
    with card:
        there = sample(card.moved(logits), seed=5, keys=card.moved(keys_of(rows)), **options)
    # One formula: every token is the same. Only a top-p boundary may move with its last bits.
    flips = int((here.token != there.token.cpu()).sum())
    assert flips <= (1 if "top_p" in options else 0)
    equal = here.token == there.token.cpu()
    assert (here.logprob - there.logprob.cpu()).abs()[equal].max() < 2e-6
    assert (here.sampled_logprob - there.sampled_logprob.cpu()).abs()[equal].max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"top_k": 40}, {"top_p": 0.7}])
@pytest.mark.parametrize(
    ("offset", "size", "heat"), [(0, 1e7, 1), (2e6, 3, 1), (3, 0, 1), (0, 3, 1e-6)]
)
def test_large_and_equal_logits_give_the_tokens_of_the_cpu(
    card: Any, dtype: torch.dtype, options: dict, offset: float, size: float, heat: float
) -> None:
    noise = torch.randn(6, 1300, generator=torch.Generator().manual_seed(3))
    logits, keys = (noise * size + offset).to(dtype), keys_of(6)
    here = sample(logits, seed=5, keys=keys, temperature=heat, **options)
    with card:
        moved = {"seed": 5, "keys": card.moved(keys), "temperature": heat, **options}
        there = sample(card.moved(logits), **moved)
    assert torch.equal(here.token, there.token.cpu())
    torch.testing.assert_close(there.logprob.cpu(), here.logprob, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", FILTERS)
def test_rows_off_alignment_and_padding_change_nothing(on_card: Any, options: dict) -> None:
    logits = torch.randn(40, 333, device=on_card.device)
    wide = torch.full((40, 403), float("nan"), device=on_card.device)
    wide[:, 3:336] = logits
    keys = on_card.moved(keys_of(40))
    a = sample(logits, seed=1, keys=keys, vocab_size=300, **options)
    b = sample(wide[:, 3:336], seed=1, keys=keys, vocab_size=300, **options)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert a.token.max() < 300


@pytest.mark.parametrize("options", FILTERS)
def test_broken_rows_are_flagged(on_card: Any, options: dict) -> None:
    logits = torch.randn(6, 700, device=on_card.device)
    logits[0, 699] = float("nan")
    logits[1] = float("-inf")
    logits[2, 5] = float("inf")
    logits[3] = float("-inf")
    logits[3, 600] = 2.0
    got = sample(logits, seed=1, keys=on_card.moved(keys_of(6)), **options)
    assert got.token[:3].tolist() == [-1, -1, -1]
    assert got.logprob[:3].isnan().all()
    assert got.token[3].item() == 600
    assert (got.token[4:] >= 0).all()
    bad = torch.tensor([-1.0], device=on_card.device)
    assert (
        sample(logits, seed=1, keys=on_card.moved(keys_of(6)), temperature=bad).token == -1
    ).all()


@pytest.mark.parametrize("heat", [1.0, 0.5, 0.0])
def test_any_split_of_the_vocabulary_gives_the_same_token(on_card: Any, heat: float) -> None:
    rows = on_card.size(64, 9)
    logits = torch.randn(rows, 4096, device=on_card.device) * 3
    keys = on_card.moved(keys_of(rows))
    seed = torch.tensor([1], device=on_card.device)
    temperature = torch.tensor([heat], device=on_card.device)
    whole = sample(logits, seed=seed, keys=keys, temperature=temperature, vocab_size=4000)
    for shards in (2, 4, 8):
        width = 4096 // shards
        partials = [
            torch.ops.megarlx.sample_partials(
                logits[:, i * width : (i + 1) * width], seed, keys, temperature, i * width, 4000
            )
            for i in range(shards)
        ]
        got = torch.ops.megarlx.sample_combine(torch.stack(partials), temperature)
        assert all(torch.equal(x, y) for x, y in zip(whole, got, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_graph_replays_with_new_keys_seed_and_temperature() -> None:
    logits, keys = torch.randn(32, 50257, device="cuda"), keys_of(32).cuda()
    seed, heat = torch.tensor([1], device="cuda"), torch.tensor([1.0], device="cuda")
    sample(logits, seed=seed, keys=keys, temperature=heat, top_p=torch.ones(1).cuda() * 0.9)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    p = torch.full((1,), 0.9, device="cuda")
    with torch.cuda.graph(graph):
        held = sample(logits, seed=seed, keys=keys, temperature=heat, top_p=p)
    for number in (2, 3):
        seed.fill_(number)
        keys[:, 1] += 1
        heat.fill_(0.5 * number)
        graph.replay()
        again = sample(logits, seed=seed, keys=keys, temperature=heat, top_p=p)
        assert torch.equal(held.token, again.token)
