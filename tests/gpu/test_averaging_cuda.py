"""The CUDA kernels of the averaging ops against the CPU ones; n objectives, P elements.

The formula is one header with explicit fused multiply-adds, so float32 results agree bit for bit
but for the last bit of a bias correction, for which each backend has a power function of its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megarlx.comm.groups import Group
from megarlx.ops.averaging import adamw_update_, average_adamw_, replica_average_

pytestmark = pytest.mark.gpu

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SIZES = [0, 1, 7, 8, 9, 1025, 2_000_003]
DTYPES = [torch.float32, torch.float64]


def make(n: int, count: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(count + n)

    def normal(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(count, generator=rng, dtype=dtype)

    return {
        "master": normal(),
        "grads": [normal() for _ in range(n)],
        "exp_avgs": [normal(0.1) for _ in range(n)],
        "exp_avg_sqs": [normal(0.1).square() for _ in range(n)],
        "steps": torch.arange(n) * 3,
    }


def step(state: dict[str, Any], **changes: Any) -> Tensor:
    out = torch.empty_like(state["master"], dtype=torch.bfloat16)
    n = len(state["grads"])
    arguments: dict[str, Any] = {
        "lrs": [1e-2 / (i + 1) for i in range(n)],
        "weight_decays": 0.1,
        "clips": 0.7,
        "weights": 1 / n,
        "param_out": out,
    }
    average_adamw_(**state, **(arguments | changes))
    return out


def assert_near(a: dict[str, Any], b: dict[str, Any]) -> None:
    for name in ("master", "exp_avgs", "exp_avg_sqs"):
        ours, theirs = (
            [x[name]] if isinstance(x[name], Tensor) else x[name]  # one buffer, or one each
            for x in (a, b)
        )
        for x, y in zip(ours, theirs, strict=True):
            close = (1e-14, 1e-15) if x.dtype == torch.float64 else (1e-6, 1e-7)
            torch.testing.assert_close(x.cpu(), y.cpu(), rtol=close[0], atol=close[1])
    assert a["steps"].tolist() == b["steps"].tolist()


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("narrow", [False, True])
def test_cuda_equals_cpu(card: Any, count: int, n: int, dtype: torch.dtype, narrow: bool) -> None:
    host = make(n, min(count, card.size(count, 10_007)), dtype)
    if narrow:
        host["grads"] = [g.bfloat16() for g in host["grads"]]
    device = card.moved(host)
    for _ in range(3):
        step(host)
        with card:
            out = step(device)
    assert_near(device, host)
    assert torch.equal(out, device["master"].bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", range(1, 8))
def test_unaligned_views_give_the_bits_of_aligned_buffers(
    on_card: Any, offset: int, dtype: torch.dtype
) -> None:
    aligned = on_card.moved(make(2, 10_007, dtype))

    def shifted(tensor: Tensor) -> Tensor:
        base = torch.full((10_007 + 16,), 7.0, dtype=dtype, device=on_card.device)
        base[offset : offset + 10_007] = tensor
        return base[offset : offset + 10_007]

    view = {
        k: [shifted(t) for t in v] if isinstance(v, list) else v.clone() for k, v in aligned.items()
    }
    view["master"] = shifted(aligned["master"])
    step(view)
    step(aligned)
    assert torch.equal(view["master"], aligned["master"])
    assert torch.equal(view["exp_avg_sqs"][1], aligned["exp_avg_sqs"][1])
    assert view["master"]._base.eq(7).sum() >= 16


def test_invariants_hold_bit_for_bit(on_card: Any) -> None:
    both = on_card.moved(make(2, 50_003))
    alone = {k: v[:1] if k != "master" else v.clone() for k, v in both.items()}
    alone = {
        k: [t.clone() for t in v] if isinstance(v, list) else v.clone() for k, v in alone.items()
    }
    step(both, weights=[1.0, 0.0], lrs=1e-2)
    step(alone, weights=1.0, lrs=1e-2)
    assert torch.equal(both["master"], alone["master"])

    state = on_card.moved(make(1, 50_003))
    twice = {k: [v[0], v[0].clone()] if isinstance(v, list) else v for k, v in state.items()}
    twice = {
        k: [t.clone() for t in v] if isinstance(v, list) else v.clone() for k, v in twice.items()
    }
    twice["steps"] = state["steps"].repeat(2)
    step(twice, weights=[0.5, 0.5], lrs=1e-2)
    step(state, weights=1.0, lrs=1e-2)
    assert torch.equal(twice["master"], state["master"])


def test_found_inf_skips_only_its_objective(on_card: Any) -> None:
    state = on_card.moved(make(2, 10_007))
    before = {k: v[1].clone() if isinstance(v, list) else v.clone() for k, v in state.items()}
    state["grads"][1].fill_(float("nan"))
    step(state, found_inf=torch.tensor([0.0, 1.0], device=on_card.device))
    assert state["master"].isfinite().all()
    assert not torch.equal(state["master"], before["master"])
    assert torch.equal(state["exp_avgs"][1], before["exp_avgs"])
    assert torch.equal(state["exp_avg_sqs"][1], before["exp_avg_sqs"])
    assert state["steps"].tolist() == [1, 3]


@needs_cuda
def test_a_step_does_not_wait_for_the_device_and_replays_in_a_graph(card: Any) -> None:
    state = card.moved(make(2, 10_007))
    reference = card.moved(make(2, 10_007))
    numbers = torch.full((2,), 0.5, dtype=torch.float64, device="cuda")
    arguments: dict[str, Any] = {
        "lrs": numbers * 0.01,
        "weight_decays": numbers,
        "clips": numbers,
        "weights": numbers,
    }
    saved = {
        k: [t.clone() for t in v] if isinstance(v, list) else v.clone() for k, v in state.items()
    }
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(state, **arguments)
        step(state, lrs=[0.1, 0.2])  # sequences too
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, value in saved.items():
        for old, new in zip(
            *((x if isinstance(x, list) else [x]) for x in (state[name], value)), strict=True
        ):
            old.copy_(new)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(state, **arguments)
    for _ in range(3):
        graph.replay()
        step(reference, **arguments)
    assert torch.equal(state["master"], reference["master"])
    assert state["steps"].tolist() == [3, 6]


@pytest.mark.parametrize("count", [*SIZES, 65_536, 65_537])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_update_and_replica_average_equal_the_cpu(
    card: Any, count: int, dtype: torch.dtype, narrow: bool
) -> None:
    wire = torch.bfloat16 if narrow else dtype

    def both_halves(s: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        delta = adamw_update_(
            s["master"], s["grads"][0], s["exp_avgs"][0], s["exp_avg_sqs"][0],
            lr=1e-2, weight_decay=0.1, steps=s["steps"],
        )  # fmt: skip
        out = torch.empty_like(delta, dtype=torch.bfloat16)
        report = replica_average_(
            s["master"], delta, weight=0.5, group=Group.alone("replica"), wire=wire, param_out=out
        )
        assert torch.equal(out, s["master"].bfloat16())
        return s["master"].cpu(), report.squared_norm.cpu(), report.found_inf.cpu()

    state = make(1, min(count, card.size(count, 140_003)), dtype)
    moved = card.moved(state)
    master, norm, flag = both_halves(state)
    with card:
        their_master, their_norm, their_flag = both_halves(moved)
    tolerance = 1e-4 if narrow else 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(master, their_master, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(norm, their_norm, rtol=1e-6, atol=0)
    assert flag.item() is their_flag.item() is False


@pytest.mark.parametrize("where", [0, 70_000, -1])
def test_an_overflow_is_found_and_left_out(on_card: Any, where: int) -> None:
    master, delta = (make(100_003, device=on_card.device) for make in (torch.zeros, torch.ones))
    delta[where] = float("inf")
    report = replica_average_(master, delta, weight=1.0, group=Group.alone("replica"))
    assert report.found_inf.item()
    assert master.eq(0).all()


@needs_cuda
def test_more_elements_than_32_bits_count() -> None:
    count = 2**31 + 11
    if torch.cuda.mem_get_info()[0] < 20 * count:
        pytest.skip("needs 43 GB of free device memory")
    master, grad, exp_avg, exp_avg_sq = (torch.zeros(count, device="cuda") for _ in range(4))
    grad[-1] = 1.0
    steps = torch.zeros(1, dtype=torch.int64, device="cuda")
    average_adamw_(master, [grad], [exp_avg], [exp_avg_sq], lrs=0.5, steps=steps, weights=1.0)
    assert master[-1].item() == pytest.approx(-0.5)
    assert master[:-1].eq(0).all()
    assert exp_avg_sq[-1].item() > 0
