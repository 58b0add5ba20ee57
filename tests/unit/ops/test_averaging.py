"""average_adamw_ and adamw_update_: P is the number of elements, n of objectives."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from other_processes import INSTRUCTION_SETS
from torch import Tensor

from megarlx.ops.averaging import adamw_update_, average_adamw_, average_adamw_reference_

BETAS = (0.9, 0.95)


@dataclass
class State:
    master: Tensor
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: Tensor

    def copy(self) -> State:
        return State(
            self.master.clone(),
            [g.clone() for g in self.grads],
            [m.clone() for m in self.exp_avgs],
            [v.clone() for v in self.exp_avg_sqs],
            self.steps.clone(),
        )

    def only(self, i: int) -> State:
        s = self.copy()
        one = slice(i, i + 1)
        return State(s.master, s.grads[one], s.exp_avgs[one], s.exp_avg_sqs[one], s.steps[one])

    def written(self) -> list[Tensor]:
        return [self.master, *self.exp_avgs, *self.exp_avg_sqs, self.steps]


def make(n: int, count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> State:
    """A state in mid-training: moments of plausible size, a different step for each objective."""
    rng = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(count, generator=rng, dtype=torch.float64)

    return State(
        normal().to(dtype),
        [normal().to(dtype) for _ in range(n)],
        [(0.1 * normal()).to(dtype) for _ in range(n)],
        [(0.1 * normal() ** 2).to(dtype) for _ in range(n)],
        torch.arange(n) * 3,
    )


def step(state: State, **changes: Any) -> None:
    arguments: dict[str, Any] = {
        "lrs": 1e-2,
        "betas": BETAS,
        "weight_decays": 0.1,
        "weights": 1 / len(state.grads),
    }
    average_adamw_(
        state.master,
        state.grads,
        state.exp_avgs,
        state.exp_avg_sqs,
        steps=state.steps,
        **(arguments | changes),
    )


def same(a: State, b: State) -> bool:
    """The same bits: NaNs and the signs of zeros included."""
    return all(
        torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        for x, y in zip(a.written(), b.written(), strict=True)
    )


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_equals_n_textbook_adamw_runs_from_the_snapshot_in_fp64(n: int) -> None:
    count, steps = 1003, 7
    rng = torch.Generator().manual_seed(n)
    lrs = [10 ** -(2 + 0.3 * i) for i in range(n)]
    decays = [0.1 * i for i in range(n)]
    betas = [(0.9 - 0.05 * i, 0.95 + 0.006 * i) for i in range(n)]
    epsilons = [10.0 ** -(8 - i % 3) for i in range(n)]
    clips = [1 - 0.1 * i for i in range(n)]
    weights = [(i + 1) / (n * (n + 1) / 2) for i in range(n)]

    theirs = torch.randn(count, generator=rng, dtype=torch.float64)
    parameters = [theirs.clone().requires_grad_() for _ in range(n)]
    optimizers = [
        torch.optim.AdamW([p], lr=lrs[i], betas=betas[i], eps=epsilons[i], weight_decay=decays[i])
        for i, p in enumerate(parameters)
    ]
    ours = State(
        theirs.clone(),
        [],
        [torch.zeros_like(theirs) for _ in range(n)],
        [torch.zeros_like(theirs) for _ in range(n)],
        torch.zeros(n, dtype=torch.int64),
    )
    for _ in range(steps):
        grads = [torch.randn(count, generator=rng, dtype=torch.float64) for _ in range(n)]
        updates = []
        for i, (parameter, optimizer) in enumerate(zip(parameters, optimizers, strict=True)):
            with torch.no_grad():
                parameter.copy_(theirs)
            parameter.grad = clips[i] * grads[i]
            optimizer.step()
            updates.append(weights[i] * (parameter.detach() - theirs))
        theirs = theirs + sum(updates)
        ours.grads = grads
        step(
            ours,
            lrs=lrs,
            betas=betas,
            eps=epsilons,
            weight_decays=decays,
            clips=clips,
            weights=weights,
        )
    assert torch.allclose(ours.master, theirs, rtol=1e-12, atol=1e-12)
    for i, optimizer in enumerate(optimizers):
        moments = optimizer.state[parameters[i]]
        assert torch.allclose(ours.exp_avgs[i], moments["exp_avg"], rtol=1e-12, atol=1e-15)
        assert torch.allclose(ours.exp_avg_sqs[i], moments["exp_avg_sq"], rtol=1e-12, atol=1e-15)
    assert ours.steps.tolist() == [steps] * n


def test_one_objective_equals_torch_adamw_to_rounding_in_fp32() -> None:
    rng = torch.Generator().manual_seed(3)
    theirs = torch.randn(5001, generator=rng).requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=BETAS, weight_decay=0.1)
    ours = make(1, 5001)
    ours.master.copy_(theirs.detach())
    ours.exp_avgs[0].zero_()
    ours.exp_avg_sqs[0].zero_()
    for _ in range(20):
        ours.grads = [torch.randn(5001, generator=rng)]
        theirs.grad = ours.grads[0].clone()
        optimizer.step()
        step(ours)
    assert torch.allclose(ours.master, theirs.detach(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("skip", [False, True])
def test_equals_the_plain_torch_reference(n: int, skip: bool) -> None:
    ours = make(n, 777, torch.float64)
    theirs = ours.copy()
    found_inf = torch.tensor([float(skip and i == n - 1) for i in range(n)])
    arguments: dict[str, Any] = {
        "lrs": torch.linspace(1e-3, 1e-2, n, dtype=torch.float64),
        "betas": BETAS,
        "weight_decays": torch.linspace(0, 0.1, n, dtype=torch.float64),
        "clips": torch.linspace(0.5, 1, n, dtype=torch.float64),
        "weights": torch.full((n,), 1 / n, dtype=torch.float64),
        "found_inf": found_inf,
    }
    out, their_out = torch.empty_like(ours.master), torch.empty_like(ours.master)
    for _ in range(3):
        step(ours, **arguments, param_out=out)
        average_adamw_reference_(
            theirs.master,
            theirs.grads,
            theirs.exp_avgs,
            theirs.exp_avg_sqs,
            steps=theirs.steps,
            param_out=their_out,
            **arguments,
        )
    for a, b in zip(ours.written(), theirs.written(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)
    assert torch.allclose(out, their_out, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("first", [True, False])
def test_weights_one_and_zero_are_one_objective_alone_bit_for_bit(
    dtype: torch.dtype, first: bool
) -> None:
    both = make(2, 1027, dtype)
    both.master[:5] = torch.tensor([0.0, -0.0, 1e-42, -1e-42, 0.0], dtype=dtype)
    for buffer in (both.grads, both.exp_avgs):
        for i in range(2):
            buffer[i][:2] = torch.tensor([-0.0, 0.0], dtype=dtype)
    i = 0 if first else 1
    alone = both.only(i)
    for _ in range(5):
        step(both, weights=[1.0, 0.0] if first else [0.0, 1.0])
        step(alone, weights=1.0)
    assert torch.equal(both.master.view(torch.uint8), alone.master.view(torch.uint8))
    assert torch.equal(both.exp_avgs[i], alone.exp_avgs[0])
    assert torch.equal(both.exp_avg_sqs[i], alone.exp_avg_sqs[0])


def test_equal_gradients_and_states_make_exactly_one_adam_step() -> None:
    alone = make(1, 1027)
    both = State(
        alone.master.clone(),
        [alone.grads[0], alone.grads[0]],  # what is only read may be shared
        [alone.exp_avgs[0].clone() for _ in range(2)],
        [alone.exp_avg_sqs[0].clone() for _ in range(2)],
        alone.steps.repeat(2),
    )
    for _ in range(4):
        step(both, weights=[0.5, 0.5])
        step(alone, weights=1.0)
    assert torch.equal(both.master, alone.master)


def test_zero_gradient_with_fresh_state_and_no_decay_makes_exactly_half_the_other_step() -> None:
    both = make(2, 1027)
    both.grads[1].zero_()
    both.exp_avgs[1].zero_()
    both.exp_avg_sqs[1].zero_()
    both.steps[1] = 0
    delta = adamw_update_(
        both.master.clone(),
        both.grads[0],
        both.exp_avgs[0].clone(),
        both.exp_avg_sqs[0].clone(),
        lr=1e-2,
        betas=BETAS,
        steps=both.steps[:1].clone(),
    )
    expected = both.master + 0.5 * delta
    step(both, weights=[0.5, 0.5], weight_decays=0.0)
    assert torch.equal(both.master, expected)


def fresh(count: int, dtype: torch.dtype = torch.float64) -> State:
    state = make(2, count, dtype)
    for moment in (*state.exp_avgs, *state.exp_avg_sqs):
        moment.zero_()
    state.steps.zero_()
    return state


def test_scaling_one_loss_by_a_constant_changes_almost_nothing() -> None:
    plain, scaled = fresh(501), fresh(501)
    rng = torch.Generator().manual_seed(1)
    start = plain.master.clone()
    for _ in range(10):
        grads = [torch.randn(501, generator=rng, dtype=torch.float64) for _ in range(2)]
        plain.grads, scaled.grads = grads, [grads[0], 1000 * grads[1]]
        step(plain, weight_decays=0.0)
        step(scaled, weight_decays=0.0)
    moved = (plain.master - start).norm()
    assert (plain.master - scaled.master).norm() < 1e-4 * moved


def test_is_not_half_the_sum_of_the_losses_under_one_adam() -> None:
    ours = fresh(501)
    one_adam = ours.only(0)
    start = ours.master.clone()
    rng = torch.Generator().manual_seed(1)
    for _ in range(10):
        ours.grads = [torch.randn(501, generator=rng, dtype=torch.float64) for _ in range(2)]
        one_adam.grads = [0.5 * (ours.grads[0] + ours.grads[1])]
        step(ours, weight_decays=0.0)
        step(one_adam, weight_decays=0.0)
    assert (ours.master - one_adam.master).norm() > 0.05 * (ours.master - start).norm()


@pytest.mark.parametrize("kind", [torch.float32, torch.bool, torch.int32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_found_inf_skips_only_its_objective(kind: torch.dtype, bad: float) -> None:
    state = make(3, 1027)
    before = state.copy()
    state.grads[1].fill_(bad)
    step(state, weights=[0.5, 0.5, 0.25], found_inf=torch.tensor([0, 1, 0]).to(kind))
    others = State(
        before.master.clone(),
        [before.grads[0], before.grads[2]],
        [before.exp_avgs[0].clone(), before.exp_avgs[2].clone()],
        [before.exp_avg_sqs[0].clone(), before.exp_avg_sqs[2].clone()],
        before.steps[[0, 2]].clone(),
    )
    step(others, weights=[0.5, 0.25])  # the weights stay what they are
    assert torch.equal(state.master, others.master)
    assert torch.equal(state.exp_avgs[1], before.exp_avgs[1])
    assert torch.equal(state.exp_avg_sqs[1], before.exp_avg_sqs[1])
    assert torch.equal(state.exp_avgs[2], others.exp_avgs[1])
    assert state.steps.tolist() == [1, 3, 7]


def test_a_step_with_every_objective_skipped_changes_no_bit_of_state_and_still_copies_out() -> None:
    state = make(2, 99)
    state.master[:2] = torch.tensor([0.0, -0.0])
    before = state.copy()
    out = torch.empty(99, dtype=torch.bfloat16)
    step(state, found_inf=torch.tensor([1.0, float("nan")]), param_out=out)
    assert same(state, before)
    assert torch.equal(out, before.master.bfloat16())


@pytest.mark.parametrize("count", [0, 1, 2, 7, 15, 16, 17, 31, 33, 1023, 1024, 1025, 40_001])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_every_size_gives_each_element_the_same_bits(count: int, grad_dtype: torch.dtype) -> None:
    whole = make(2, 40_001)
    whole.grads = [g.to(grad_dtype) for g in whole.grads]
    part = State(
        whole.master[:count].clone(),
        [g[:count].clone() for g in whole.grads],
        [m[:count].clone() for m in whole.exp_avgs],
        [v[:count].clone() for v in whole.exp_avg_sqs],
        whole.steps.clone(),
    )
    out, whole_out = (torch.empty(size, dtype=torch.bfloat16) for size in (count, 40_001))
    step(whole, param_out=whole_out)
    step(part, param_out=out)
    assert torch.equal(part.master, whole.master[:count])
    assert torch.equal(out, whole_out[:count])
    assert torch.equal(part.exp_avg_sqs[1], whole.exp_avg_sqs[1][:count])
    assert part.steps.tolist() == [1, 4]  # a rank whose shard is empty counts steps like the others


@pytest.mark.parametrize("offset", range(1, 16))
def test_views_at_any_offset_give_the_same_bits_and_touch_nothing_around(offset: int) -> None:
    count = 261
    aligned = make(2, count)

    def shifted(tensor: Tensor, by: int) -> Tensor:
        base = torch.full((count + 32,), 7.0, dtype=tensor.dtype)
        base[by : by + count] = tensor
        return base[by : by + count]

    view = State(
        shifted(aligned.master, offset),
        [shifted(g, (offset * 3) % 16) for g in aligned.grads],
        [shifted(m, (offset * 5) % 16) for m in aligned.exp_avgs],
        [shifted(v, 16 - offset) for v in aligned.exp_avg_sqs],
        aligned.steps.clone(),
    )
    out = shifted(torch.zeros(count, dtype=torch.bfloat16), offset)
    step(view, param_out=out)
    step(aligned)
    assert same(view, aligned)
    assert torch.equal(out, aligned.master.bfloat16())
    for tensor in (view.master, *view.exp_avgs, *view.exp_avg_sqs, out):
        base = tensor._base
        assert base is not None
        assert base.eq(7).sum() >= 32


def test_any_number_of_threads_gives_the_same_bits() -> None:
    count, results = 150_001, []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3, 5):
            torch.set_num_threads(number)
            state = make(2, count)
            step(state)
            results.append(state)
    finally:
        torch.set_num_threads(threads)
    assert all(same(results[0], other) for other in results[1:])


def test_a_thousand_fp32_steps_stay_near_fp64() -> None:
    exact = fresh(257, torch.float64)
    rounded = fresh(257, torch.float32)
    exact.master.copy_(rounded.master)
    rng = torch.Generator().manual_seed(5)
    start = exact.master.clone()
    for _ in range(1000):
        grads = [torch.randn(257, generator=rng) + 0.1 for _ in range(2)]
        rounded.grads, exact.grads = grads, [g.double() for g in grads]
        step(rounded, lrs=1e-3)
        step(exact, lrs=1e-3)
    assert (exact.master - start).norm() > 0.1
    assert (rounded.master - exact.master).norm() < 2e-6 * exact.master.norm()


def test_bfloat16_copy_rounds_to_nearest_and_ties_to_even() -> None:
    below, above = 1 + 2**-7, 1 + 2**-6  # two neighbours in bfloat16, odd and even
    values = torch.tensor(
        [
            *(1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), -(1 + 3 * 2**-8)),  # ties
            *(1 + 2**-8 + 2**-20, 1 + 2**-8 - 2**-20, below + 2**-20, above - 2**-20),
            *(3.3895e38, 3.4e38, float("inf"), -float("inf"), 1e-41, 0.0, -0.0, 65504.0),
        ]
    )
    state = make(1, len(values))
    state.master.copy_(values)
    out = torch.empty(len(values), dtype=torch.bfloat16)
    step(state, found_inf=torch.tensor([True]), param_out=out)
    assert out[:4].tolist() == [1.0, above, -1.0, -above]
    assert torch.equal(out.view(torch.int16), values.bfloat16().view(torch.int16))


def test_bfloat16_gradients_equal_the_same_numbers_in_fp32() -> None:
    narrow = make(2, 1027)
    narrow.grads = [g.bfloat16() for g in narrow.grads]
    wide = narrow.copy()
    wide.grads = [g.float() for g in narrow.grads]
    step(narrow)
    step(wide)
    assert same(narrow, wide)


def test_param_out_may_have_the_masters_dtype() -> None:
    state = make(2, 65)
    out = torch.empty(65)
    step(state, param_out=out)
    assert torch.equal(out, state.master)


def test_numbers_may_be_floats_sequences_or_tensors() -> None:
    a, b, c = (make(2, 65) for _ in range(3))
    step(a, lrs=0.01, clips=0.5)
    step(b, lrs=[0.01, 0.01], clips=(0.5, 0.5), eps=[1e-8, 1e-8], betas=[BETAS, BETAS])
    step(c, lrs=torch.full((2,), 0.01, dtype=torch.float64), clips=torch.tensor(0.5))
    assert same(a, b)
    assert same(a, c)


def test_delta_is_the_update_and_leaves_the_master() -> None:
    state = make(1, 1027)
    moved, before = state.copy(), state.master.clone()
    delta = adamw_update_(
        state.master,
        state.grads[0],
        state.exp_avgs[0],
        state.exp_avg_sqs[0],
        lr=1e-2,
        betas=BETAS,
        weight_decay=0.1,
        steps=state.steps,
    )
    step(moved, weights=1.0)
    assert torch.equal(state.master, before)
    assert torch.equal(before + delta, moved.master)
    assert torch.equal(state.exp_avgs[0], moved.exp_avgs[0])
    assert torch.equal(state.steps, moved.steps)
    skipped = adamw_update_(
        state.master,
        torch.full_like(before, float("nan")),
        state.exp_avgs[0],
        state.exp_avg_sqs[0],
        lr=1e-2,
        steps=state.steps,
        found_inf=torch.tensor([1.0]),
    )
    assert skipped.eq(0).all()
    assert torch.equal(state.exp_avgs[0], moved.exp_avgs[0])
    assert torch.equal(state.steps, moved.steps)


SCRIPT = """
import json, sys, hashlib, torch
sys.path.insert(0, sys.argv[1])
from test_averaging import make, step
from megarlx.ops import native
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float64):
    state = make(3, 5003, dtype)
    out = torch.empty(5003, dtype=torch.bfloat16)
    for _ in range(3):
        step(state, clips=[0.3, 0.7, 1.0], weights=[0.2, 0.3, 0.5], param_out=out)
    for tensor in [*state.written(), out.view(torch.int16)]:
        digest.update(tensor.numpy().tobytes())
print(json.dumps([native.load().instruction_set, digest.hexdigest()]))
"""


def test_every_instruction_set_gives_the_same_bits() -> None:
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, os.path.dirname(__file__)],
            env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for capability in INSTRUCTION_SETS
    ]
    found = {}
    for run in runs:
        out, error = run.communicate(timeout=120)
        assert run.returncode == 0, error
        name, digest = json.loads(out)
        found[name] = digest
    if len(found) < 2:
        pytest.skip(f"this CPU runs only {list(found)}")
    assert len(set(found.values())) == 1, found


def test_leaves_no_trace_in_autograd_and_marks_what_it_changed() -> None:
    state = make(1, 33)
    weight = state.master.requires_grad_()
    saved = (weight * weight).sum()
    step(state)
    assert weight.grad_fn is None
    assert not state.exp_avgs[0].requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def arguments(state: State) -> dict[str, Any]:
    n = len(state.grads)
    numbers = torch.ones(n, dtype=torch.float64)
    return {
        "lrs": 1e-2 * numbers,
        "beta1s": [0.9] * n,
        "beta2s": [0.95] * n,
        "eps": [1e-8] * n,
        "weight_decays": 0.1 * numbers,
        "steps": state.steps,
        "clips": numbers,
        "weights": numbers / n,
        "found_inf": torch.zeros(n, dtype=torch.bool),
        "param_out": torch.empty_like(state.master, dtype=torch.bfloat16),
    }


def test_opcheck() -> None:
    state = make(2, 37)
    torch.library.opcheck(
        torch.ops.megarlx.average_adamw_.default,
        (state.master, state.grads, state.exp_avgs, state.exp_avg_sqs),
        arguments(state),
    )
    one = torch.ones(1, dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.megarlx.adamw_update_.default,
        (state.master, state.grads[0], state.exp_avgs[0], state.exp_avg_sqs[0]),
        {
            "lr": one,
            "beta1": 0.9,
            "beta2": 0.95,
            "eps": 1e-8,
            "weight_decay": one,
            "steps": torch.zeros(1, dtype=torch.int64),
            "clip": one,
            "found_inf": None,
            "delta": torch.empty_like(state.master),
        },
    )


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "lr": ({"lrs": -1.0}, r"lrs is -1.0; allowed: finite, >= 0"),
    "lr nan": ({"lrs": [1.0, float("nan")]}, r"lrs is nan"),
    "lr number": ({"lrs": [1.0]}, r"number of lrs is 1; allowed: 2"),
    "lr dtype": ({"lrs": torch.ones(2, dtype=torch.int64)}, r"lrs is torch.int64 \[2\]"),
    "clip shape": ({"clips": torch.ones(3)}, r"clips is torch.float32 \[3\]; allowed: .*\[2\]"),
    "beta": ({"betas": (0.9, 1.0)}, r"beta2s\[0\] is 1; allowed: 0 <= beta < 1"),
    "beta nan": ({"betas": (float("nan"), 0.9)}, r"beta1s\[0\] is nan"),
    "betas": ({"betas": [(0.9, 0.95)] * 3}, r"betas is .* a pair, or 2 pairs"),
    "eps": ({"eps": 0.0}, r"eps\[0\] is 0; allowed: a positive number"),
    "eps number": ({"eps": [1e-8] * 3}, r"number of eps is 3"),
    "weights": ({"weights": float("inf")}, r"weights is inf; allowed: finite"),
    "steps dtype": ({"steps": torch.zeros(2)}, r"steps.dtype is Float; allowed: Long"),
    "steps shape": ({"steps": torch.zeros(1, dtype=torch.int64)}, r"steps.shape is \[1\]"),
    "found_inf": ({"found_inf": torch.zeros(3)}, r"found_inf.shape is \[3\]"),
    "out shape": ({"param_out": torch.empty(9)}, r"param_out.shape is \[9\]; allowed: \[10\]"),
    "out dtype": ({"param_out": torch.empty(10, dtype=torch.half)}, r"param_out.dtype is Half"),
    "grads": ({"grads": [torch.zeros(10)] * 9}, r"number of grads is 9; allowed: 1 to 8"),
    "no grads": ({"grads": []}, r"number of grads is 0"),
    "grad shape": ({"grads": [torch.zeros(10), torch.zeros(11)]}, r"grads\[1\].shape is \[11\]"),
    "grad dtype": ({"grads": [torch.zeros(10).double()] * 2}, r"grads\[0\].dtype is Double"),
    "mixed": (
        {"grads": [torch.zeros(10), torch.zeros(10).bfloat16()]},
        r"grads\[1\].dtype is BFloat16; allowed: Float, as grads\[0\]",
    ),
    "stride": ({"grads": [torch.zeros(20)[::2]] * 2}, r"grads\[0\].stride is \[2\]"),
    "moments": ({"exp_avgs": [torch.zeros(10)]}, r"number of exp_avgs is 1; allowed: 2"),
    "device": (
        {"exp_avgs": [torch.zeros(10, device="meta")] * 2},
        r"device is .*meta.*; allowed: one device",
    ),
    "master": ({"master": torch.zeros(10).half()}, r"master.dtype is Half; allowed: Float or"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_changes_nothing(name: str) -> None:
    changes, message = BAD[name]
    state = make(2, 10)
    before = state.copy()
    call: dict[str, Any] = {
        "master": state.master,
        "grads": state.grads,
        "exp_avgs": state.exp_avgs,
        "exp_avg_sqs": state.exp_avg_sqs,
        "lrs": 1e-2,
        "steps": state.steps,
        "weights": 0.5,
    }
    with pytest.raises(ValueError, match=rf"megarlx.average_adamw_: .*{message}"):
        average_adamw_(**(call | changes))
    assert same(state, before)


def test_buffers_that_overlap_are_refused() -> None:
    # master, exp_avgs of both, exp_avg_sqs of both, param_out
    for a, b in itertools.permutations(range(6), 2):
        base = torch.zeros(40)
        buffers = [torch.zeros(20) for _ in range(6)]
        buffers[a], buffers[b] = base[:20], base[19:39]  # one element in common
        with pytest.raises(ValueError, match="in the same memory as"):
            average_adamw_(
                buffers[0],
                [torch.zeros(20), torch.zeros(20)],
                buffers[1:3],
                buffers[3:5],
                lrs=1e-2,
                steps=torch.zeros(2, dtype=torch.int64),
                weights=0.5,
                param_out=buffers[5],
            )
    state = make(2, 20)
    state.grads[1] = state.master
    with pytest.raises(ValueError, match=r"grads\[1\] is in the same memory as master"):
        step(state)


def test_random_arguments_either_work_or_raise_a_named_error() -> None:
    rng = torch.Generator().manual_seed(11)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=rng))]

    worked, messages = 0, []
    for _ in range(600):
        n = pick(1, 2, 3)
        shape = pick((0,), (1,), (17,), (3, 5), ())

        def tensor(shape: tuple[int, ...] = shape) -> Tensor:
            actual = shape if pick(*[True] * 40, False) else pick((2,), (5, 3))
            dtype = pick(*[torch.float32] * 100, torch.bfloat16, torch.float64, torch.int64)
            return torch.zeros(actual, dtype=dtype)

        def numbers(n: int = n) -> Any:
            good = (0.1, [0.1] * n, torch.ones(n)) * 8
            return pick(*good, torch.ones(n + 1), [0.1] * (n + 1), -0.5)

        call: dict[str, Any] = {
            "lrs": numbers(),
            "betas": pick((0.9, 0.9), [(0.5, 0.5)] * n, (0.9, 1.5), 3 * [(0.0, 0.0)]),
            "weight_decays": numbers(),
            "clips": numbers(),
            "weights": numbers(),
            "steps": torch.zeros(pick(n, n, n, n + 1), dtype=torch.int64),
            "found_inf": pick(None, torch.zeros(n), torch.zeros(n, dtype=torch.bool)),
            "param_out": pick(None, tensor()),
        }
        try:
            average_adamw_(
                tensor(),
                [tensor() for _ in range(n)],
                [tensor() for _ in range(n)],
                [tensor() for _ in range(n)],
                **call,
            )
            worked += 1
        except ValueError as error:
            messages.append(str(error))
    assert 60 < worked < 540
    assert all(re.search(r"megarlx.average_adamw_: .* is .*; allowed: .", m) for m in messages)
    assert len({m.split(" is ")[0] for m in messages}) > 10
