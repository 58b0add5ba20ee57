"""linear_token_loss against autograd through whole logits. Letters: T tokens, d hidden, V ids."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megarlx.comm.groups import Group
from megarlx.ops.linear_token_loss import linear_token_loss
from megarlx.ops.loss_spec import KL_ESTIMATORS, MODES, LossSpec
from megarlx.ops.token_loss import token_loss

GRID = [
    LossSpec(mode, 0.2, 0.3, 0.0, kl, 0.0 if kl == "none" else 0.3, 0.1)
    for mode in MODES
    for kl in KL_ESTIMATORS
]


def example(
    spec: LossSpec, tokens: int = 23, size: int = 5, vocabulary: int = 31, dtype=torch.float64
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor | None]]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight = normal(tokens, size), normal(vocabulary, size)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    lp = (hidden @ weight.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    inputs: dict[str, Tensor | None] = {
        "mask": torch.rand(tokens, generator=generator) > 0.3,
        "advantages": None if spec.mode == "nll" else normal(tokens),
        "old_logprobs": lp + 0.4 * normal(tokens),
        "ref_logprobs": lp + 0.5 * normal(tokens),
        "token_weights": normal(tokens).abs() + 0.5,
    }
    return hidden.requires_grad_(), weight.requires_grad_(), targets, inputs


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("rows", [1, 4, 7, 1000])
@pytest.mark.parametrize("spec", GRID, ids=lambda spec: f"{spec.mode}-{spec.kl}")
def test_equals_token_loss_of_whole_logits_in_any_chunks(spec: LossSpec, rows: int) -> None:
    hidden, weight, targets, inputs = example(spec)
    common = {"normalizer": 7.0, "temperature": 0.9, **inputs}
    ours = linear_token_loss(hidden, weight, targets, spec, rows_per_chunk=rows, **common)
    whole = token_loss(hidden @ weight.t(), targets, spec, **common)
    for a, b in zip(ours, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        gradients(ours.loss, hidden, weight), gradients(whole.loss, hidden, weight), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("spec", GRID, ids=lambda spec: f"{spec.mode}-{spec.kl}")
def test_gradcheck_in_fp64(spec: LossSpec) -> None:
    hidden, weight, targets, inputs = example(spec, tokens=4, size=3, vocabulary=6)
    if spec.mode == "cispo":  # its value is not its antiderivative: the clipped ratio is constant
        inputs["old_logprobs"] = inputs["old_logprobs"] - 5.0

    def loss(h: Tensor, w: Tensor) -> Tensor:
        common = {"normalizer": 3.0, "rows_per_chunk": 3, **inputs}
        return linear_token_loss(h, w, targets, spec, **common).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_one_nll_is_cross_entropy_in_lower_precision(dtype: torch.dtype) -> None:
    hidden, weight, targets, _ = example(LossSpec(), 50, 16, 100, dtype=torch.float64)
    h, w = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
    result = linear_token_loss(h, w, targets, LossSpec(), normalizer=50, rows_per_chunk=16)
    precise = [x.detach().double().requires_grad_() for x in (h, w)]
    expected = F.cross_entropy(precise[0] @ precise[1].t(), targets)
    assert result.loss.dtype == torch.float32
    assert result.loss.item() == pytest.approx(expected.item(), rel=3e-6)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    for a, b in zip(gradients(result.loss, h, w), gradients(expected, *precise), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= tolerance * b.norm()


def test_rows_without_tokens_give_zero_and_no_nan() -> None:
    hidden, weight, targets, inputs = example(LossSpec())
    inputs["mask"] = torch.zeros_like(inputs["mask"])
    result = linear_token_loss(hidden, weight, targets, LossSpec(), normalizer=0.0, **inputs)
    assert result.loss == 0
    assert all((g == 0).all() for g in gradients(result.loss, hidden, weight))


def test_masked_rows_are_dropped_whatever_they_hold() -> None:
    spec = LossSpec("ppo_clip")
    hidden, weight, targets, inputs = example(spec)
    mask = inputs["mask"]
    clean = linear_token_loss(hidden, weight, targets, spec, normalizer=2, **inputs)
    expected = gradients(clean.loss, hidden, weight)
    targets[~mask] = -100
    for drop in (True, False):
        same = linear_token_loss(
            hidden, weight, targets, spec, normalizer=2, drop_masked=drop, **inputs
        )
        torch.testing.assert_close(same, clean, rtol=1e-12, atol=1e-12)
        for a, b in zip(gradients(same.loss, hidden, weight), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    dirty = hidden.detach().clone()
    dirty[~mask] = math.nan
    dirty.requires_grad_()
    result = linear_token_loss(dirty, weight, targets, spec, normalizer=2, **inputs)
    for a, b in zip(gradients(result.loss, dirty, weight), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_weight_gradient_is_added_to_a_buffer() -> None:
    hidden, weight, targets, inputs = example(LossSpec())
    buffer = torch.full_like(weight, 2.0).detach()
    common = {"normalizer": 3, "rows_per_chunk": 4, **inputs}
    plain = linear_token_loss(hidden, weight, targets, LossSpec(), **common)
    expected = gradients(plain.loss, hidden, weight)
    added = linear_token_loss(hidden, weight, targets, LossSpec(), weight_grad_=buffer, **common)
    added.loss.backward()
    torch.testing.assert_close(hidden.grad, expected[0])
    torch.testing.assert_close(buffer, expected[1] + 2.0)
    assert weight.grad is None
    twice = linear_token_loss(hidden, weight, targets, LossSpec(), weight_grad_=buffer, **common)
    with pytest.raises(ValueError, match=r"upstream gradient is 2\.0; allowed: 1"):
        (twice.loss * 2).backward()
    before = buffer.clone()
    with torch.no_grad():
        linear_token_loss(hidden, weight, targets, LossSpec(), weight_grad_=buffer, **common)
    assert torch.equal(buffer, before)


def test_a_kept_graph_gives_the_same_hidden_gradient_again() -> None:
    hidden, weight, targets, inputs = example(LossSpec())
    buffer = torch.zeros_like(weight).detach()
    loss = linear_token_loss(
        hidden, weight, targets, LossSpec(), normalizer=3, weight_grad_=buffer, **inputs
    ).loss
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    first = first.clone()
    (again,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(first, again)


def test_only_the_input_that_needs_a_gradient_gets_one() -> None:
    hidden, weight, targets, _ = example(LossSpec())
    fixed = weight.detach()
    result = linear_token_loss(hidden, fixed, targets, LossSpec(), normalizer=1)
    result.loss.backward()
    assert fixed.grad is None
    expected = gradients(F.cross_entropy(hidden @ fixed.t(), targets, reduction="sum"), hidden)
    torch.testing.assert_close(hidden.grad, expected[0])


def test_group_of_one_is_no_group() -> None:
    hidden, weight, targets, _ = example(LossSpec())
    a = linear_token_loss(hidden, weight, targets, LossSpec(), normalizer=1, group=Group.alone())
    b = linear_token_loss(hidden, weight, targets, LossSpec(), normalizer=1)
    assert torch.equal(a.loss, b.loss)


def test_rerun_is_bitwise_equal() -> None:
    spec = LossSpec("cispo", kl="k3", kl_coefficient=0.1, entropy_coefficient=0.01)
    runs = []
    for _ in range(2):
        hidden, weight, targets, inputs = example(spec, 300, 32, 501, dtype=torch.float32)
        result = linear_token_loss(
            hidden, weight, targets, spec, normalizer=9, rows_per_chunk=64, **inputs
        )
        runs.append((*result, *gradients(result.loss, hidden, weight)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


PEAK = """
import resource, sys, torch
from megarlx.ops.linear_token_loss import linear_token_loss
from megarlx.ops.loss_spec import LossSpec
def step(tokens, size, vocabulary):
    hidden = torch.randn(tokens, size).requires_grad_()
    weight = torch.randn(vocabulary, size).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,))
    loss = linear_token_loss(hidden, weight, targets, LossSpec(), normalizer=tokens,
                             rows_per_chunk=64).loss
    loss.backward()
step(64, 8, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(int(sys.argv[1]), 8, int(sys.argv[2]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def peak_megabytes(tokens: int, vocabulary: int) -> float:
    command = [sys.executable, "-c", PEAK, str(tokens), str(vocabulary)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_peak_memory_does_not_grow_with_tokens_times_vocabulary() -> None:
    """Whole logits of the larger case are 256 MB; a chunk of them is 4 MB."""
    small, large = peak_megabytes(256, 16384), peak_megabytes(4096, 16384)
    assert large < 64
    assert large - small < 24


def test_opcheck() -> None:
    spec = LossSpec("ppo_clip", kl="k1", kl_coefficient=0.1, entropy_coefficient=0.1)
    for with_gradient in (True, False):
        hidden, weight, targets, inputs = example(spec, tokens=9)
        if not with_gradient:
            hidden, weight = hidden.detach(), weight.detach()
        one = torch.ones((), dtype=torch.float64)
        arguments = (hidden, weight, targets, *inputs.values(), one * 3, one, 31, *spec.arguments)
        torch.library.opcheck(
            torch.ops.megarlx.linear_token_loss, (*arguments, 4, 1, True, with_gradient)
        )


BAD_VALUES = [None, 3, -1.0, math.nan, "x", torch.zeros(()), torch.zeros(4), torch.zeros(4, 3)]
BAD_VALUES += [torch.zeros(6, 3), torch.zeros(6, 2), torch.zeros(3, 6).t(), torch.zeros(0, 3)]
BAD_VALUES += [torch.zeros(6, 3, dtype=torch.float64), torch.zeros(6, 3, device="meta")]
BAD_VALUES += [torch.zeros(4, dtype=torch.bool), torch.full((4,), 6), torch.zeros(6, 3).half()]
BAD_VALUES += [torch.zeros(6, 3, dtype=torch.int64), torch.zeros(2, 6, 3)]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_argument_works_or_raises_an_error_that_names_it(data: st.DataObject) -> None:
    arguments: dict = {
        "hidden": torch.randn(4, 3, requires_grad=True),
        "weight": torch.randn(6, 3),
        "targets": torch.tensor([0, 5, 2, 3]),
        "spec": LossSpec("reinforce"),
        "normalizer": 4,
        "mask": None,
        "advantages": torch.randn(4),
        "token_weights": None,
        "temperature": 1.0,
        "vocab_size": None,
        "weight_grad_": None,
        "rows_per_chunk": 2,
        "kept_gradients_mib": 1,
    }
    changed = data.draw(st.lists(st.sampled_from(sorted(arguments)), max_size=3, unique=True))
    for key in changed:
        arguments[key] = BAD_VALUES[data.draw(st.integers(0, len(BAD_VALUES) - 1))]
    try:
        result = linear_token_loss(**arguments)
    except ValueError as error:
        message = str(error)
    else:
        assert result.loss.shape == ()
        return
    assert changed
    assert "token_loss" in message
    assert "; allowed: " in message
    assert any(key in message for key in arguments)


def test_opcheck_of_the_accumulating_op() -> None:
    hidden, weight, targets, inputs = example(LossSpec(), tokens=9)
    one = torch.ones((), dtype=torch.float64)
    arguments = (targets, *inputs.values(), one, one, 31, *LossSpec().arguments, 4, 0, True)
    h, w = hidden.detach(), weight.detach()
    op = torch.ops.megarlx._linear_token_loss_
    torch.library.opcheck(op, (h, w, *arguments, torch.zeros_like(w)))
