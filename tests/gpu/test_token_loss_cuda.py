"""The CUDA kernels of the token losses against the CPU's, and what only a GPU does."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megarlx.ops.linear_token_loss import linear_token_loss
from megarlx.ops.loss_seam import row_terms
from megarlx.ops.loss_spec import KL_ESTIMATORS, MODES, LossSpec
from megarlx.ops.policy_loss import NATIVE, reinforce
from megarlx.ops.token_inputs import TokenInputs
from megarlx.ops.token_loss import move_to_maximum_, token_loss

pytestmark = pytest.mark.gpu

SPECS = [
    LossSpec(mode, 0.2, 0.3, 0.0, kl, 0.0 if kl == "none" else 0.3, 0.1)
    for mode in MODES
    for kl in KL_ESTIMATORS
]


def example(
    spec: LossSpec, vocabulary: int, dtype: torch.dtype, tokens: int = 21
) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    generator = torch.Generator().manual_seed(vocabulary)
    precision = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=precision)

    logits = (normal(tokens, vocabulary) * 2).to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    lp = logits.to(precision).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    inputs = {
        "mask": torch.rand(tokens, generator=generator) > 0.2,
        "advantages": None if spec.mode == "nll" else normal(tokens),
        "old_logprobs": lp + 0.3 * normal(tokens),
        "ref_logprobs": lp + 0.3 * normal(tokens),
        "token_weights": normal(tokens).abs() + 0.5,
    }
    return logits, targets, inputs


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.mode}-{spec.kl}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
# Aligned rows and not; a row in shared memory, and one that is longer.
@pytest.mark.parametrize("vocabulary", [7, 1024, 50257, 151936])
def test_equals_the_cpu(card: Any, spec: LossSpec, dtype: torch.dtype, vocabulary: int) -> None:
    tokens = card.size(21, 21 if vocabulary < 5000 else 3)
    logits, targets, inputs = example(spec, vocabulary, dtype, tokens)
    here = logits.clone().requires_grad_()
    there = card.moved(logits).requires_grad_()
    common = {"normalizer": 5.0, "temperature": 0.9}
    a = token_loss(here, targets, spec, **common, **inputs)
    a.loss.backward()
    with card:
        b = token_loss(there, card.moved(targets), spec, **common, **card.moved(inputs))
        b.loss.backward()
    close = (
        {"rtol": 1e-10, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    )
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(y.detach().cpu(), x.detach(), **close)
    difference = (there.grad.cpu().double() - here.grad.double()).norm()
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3}[dtype]
    assert difference <= bound * here.grad.double().norm()


def test_rerun_is_bitwise_equal(on_card: Any) -> None:
    logits, targets, inputs = example(SPECS[-1], 50257, torch.bfloat16, on_card.size(21, 3))
    runs = []
    for _ in range(3):
        x = on_card.moved(logits).requires_grad_()
        given = on_card.moved({"targets": targets, **inputs})
        result = token_loss(x, spec=SPECS[-1], normalizer=3.0, **given)
        result.loss.backward()
        runs.append((*(r.detach() for r in result), x.grad))
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_loss_equals_cross_entropy_in_fp64(on_card: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 64, generator=generator).to(on_card.device, dtype).requires_grad_()
    weight = torch.randn(1000, 64, generator=generator) / 8
    weight = weight.to(on_card.device, dtype).requires_grad_()
    targets = torch.randint(0, 1000, (300,), generator=generator).to(on_card.device)
    precise = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    F.cross_entropy(precise[0] @ precise[1].t(), targets).backward()
    buffer = torch.zeros(1000, 64, device=on_card.device)
    spec = LossSpec()
    for into in (None, buffer):
        hidden.grad = None
        result = linear_token_loss(
            hidden, weight, targets, spec, normalizer=300, rows_per_chunk=128, weight_grad_=into
        )
        result.loss.backward()
        grad_weight = weight.grad if into is None else into
        bound = 1e-5 if dtype == torch.float32 else 1e-2
        for ours, expected in ((hidden.grad, precise[0].grad), (grad_weight, precise[1].grad)):
            assert (ours.double() - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("spec", SPECS[4::5], ids=lambda spec: f"{spec.mode}-{spec.kl}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shards", [2, 4])
def test_vocabulary_shards_equal_the_whole(
    on_card: Any, shards: int, dtype: torch.dtype, spec: LossSpec
) -> None:
    """The two ops around the seam, also with a gradient in bf16 beside logits in fp32."""
    vocabulary, width = 1000, 1024 // shards
    logits, targets, inputs = example(spec, vocabulary, dtype)
    x = on_card.moved(logits).requires_grad_()
    targets, given = on_card.moved(targets), on_card.moved(inputs)
    whole = token_loss(x, targets, spec, normalizer=2.0, temperature=0.9, **given)
    whole.loss.backward()
    padded = F.pad(x.detach(), (0, 24), value=50.0)
    pieces = [piece.contiguous() for piece in padded.split(width, 1)]
    ops, of_rows = torch.ops.megarlx, (targets, given["mask"])
    precision = whole.loss.dtype
    one, heat = (torch.tensor(v, device=on_card.device, dtype=precision) for v in (2.0, 0.9))
    partials = [
        ops.token_loss_sums(p, *of_rows, heat, i * width, vocabulary) for i, p in enumerate(pieces)
    ]
    maximum = torch.stack([p[0] for p in partials]).amax(0)
    combined = torch.stack([move_to_maximum_(p, maximum) for p in partials]).sum(0)
    combined[0] = maximum
    tokens = TokenInputs(targets, *given.values(), one, heat)
    terms = row_terms(combined, tokens, spec, with_gradient=True)
    bound = 1e-9 if dtype == torch.float64 else 1e-5
    close = {"rtol": bound, "atol": bound}
    torch.testing.assert_close(terms.sums[0].to(precision), whole.loss.detach(), **close)
    torch.testing.assert_close(terms.sums[1:].to(precision), whole.metrics, **close)
    types = [dtype, torch.bfloat16] if dtype == torch.float32 else [dtype]
    for kind in types:
        parts = []
        for i, piece in enumerate(pieces):
            into = torch.empty_like(piece, dtype=kind)
            place = (*terms.derivatives, heat, i * width, vocabulary)
            ops.token_loss_gradient_(piece, combined, *of_rows, *place, into)
            parts.append(into)
        gradient = torch.cat(parts, 1).double()
        bound = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 6e-3}[kind]
        expected = x.grad.double()
        assert (gradient[:, :vocabulary] - expected).norm() <= bound * expected.norm()
        assert (gradient[:, vocabulary:] == 0).all()


def linear_inputs(
    device: Any, tokens: int, size: int, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(tokens, size, generator=generator)
    weight = torch.randn(vocabulary, size, generator=generator) / size**0.5
    inputs = {
        "targets": torch.randint(0, vocabulary, (tokens,), generator=generator),
        "mask": torch.rand(tokens, generator=generator) > 0.2,
        "advantages": torch.randn(tokens, generator=generator),
    }
    bf16 = (one.to(device, torch.bfloat16).requires_grad_() for one in (hidden, weight))
    return *bf16, {name: value.to(device) for name, value in inputs.items()}


@pytest.mark.parametrize("final_cap", [None, 5.0])
@pytest.mark.parametrize("drop_masked", [False, True])
@pytest.mark.parametrize("loss", ["reinforce", reinforce])
def test_parts_beside_each_other_and_kept_gradients_change_nothing_but_rounding(
    on_card: Any, loss: Any, drop_masked: bool, final_cap: float | None
) -> None:
    """In bf16, where a chunk has two parts; large enough that both streams have work."""
    tokens, vocabulary = on_card.size(2048, 40), on_card.size(8192, 96)
    if on_card.emulated and not (loss == "reinforce" and final_cap is None):
        pytest.skip("bf16 products with fp32 results in Python need a GPU")
    hidden, weight, inputs = linear_inputs(on_card.device, tokens, 32, vocabulary)
    spec = LossSpec(loss, z_loss=0.01)

    def gradients(rows: int, mib: int, into: bool) -> tuple[torch.Tensor, ...]:
        buffer = torch.zeros(weight.shape, device=on_card.device) if into else None
        result = linear_token_loss(
            hidden, weight, spec=spec, normalizer=tokens, rows_per_chunk=rows,
            kept_gradients_mib=mib, weight_grad_=buffer, drop_masked=drop_masked,
            final_cap=final_cap, **inputs,
        )  # fmt: skip
        hidden.grad = weight.grad = None
        result.loss.backward()
        return (
            result.loss.detach(),
            result.logprobs,
            hidden.grad,
            weight.grad if not into else buffer,
        )

    whole = gradients(tokens, 0, False)
    for rows in (tokens // 2, tokens // 8, tokens // 8 - 1, 3):
        for mib, into in ((0, False), (64, False), (0, True), (64, True)):
            if rows == 3 and tokens > 40:
                continue
            for ours, expected in zip(gradients(rows, mib, into), whole, strict=True):
                gap = (ours.double() - expected.double()).norm()
                assert gap <= 1e-2 * expected.double().norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("loss", ["reinforce", reinforce])
def test_a_cuda_graph_takes_in_the_second_stream(loss: Any) -> None:
    """Replayed with other hidden rows, between kernels that reuse memory."""
    hidden, weight, inputs = linear_inputs("cuda", 4096, 256, 16_384)
    spec, buffer = LossSpec(loss), torch.zeros(16_384, 256, device="cuda")

    def call(mib: int) -> torch.Tensor:
        buffer.zero_()
        found = linear_token_loss(
            hidden, weight, spec=spec, normalizer=4096, rows_per_chunk=512, weight_grad_=buffer,
            kept_gradients_mib=mib, drop_masked=False, **inputs,
        )  # fmt: skip
        (by_hidden,) = torch.autograd.grad(found.loss, hidden)
        return by_hidden

    for mib in (0, 256):
        call(mib)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = call(mib)
        for _ in range(5):
            with torch.no_grad():
                hidden.normal_()
            expected = [call(mib).clone(), buffer.clone()]
            noise = [torch.randn(4096, 16_384, device="cuda") for _ in range(3)]
            graph.replay()
            found = [held.clone(), buffer.clone()]
            for a, b in zip(found, expected, strict=True):
                assert (a.double() - b.double()).norm() <= 1e-3 * b.double().norm()
            del noise


def test_a_function_equals_the_native_loss(on_card: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(60, 16, generator=generator).to(on_card.device).requires_grad_()
    weight = (torch.randn(100, 16, generator=generator) / 4).to(on_card.device).requires_grad_()
    _, targets, inputs = example(SPECS[-1], 100, torch.float32, 60)
    targets, given = on_card.moved(targets), on_card.moved(inputs)
    found = []
    for mode in ("ppo_clip", NATIVE["ppo_clip"]):
        for drop in (True, False):
            spec = LossSpec(mode, kl="k3", kl_coefficient=0.1, settings=LossSpec())
            result = linear_token_loss(
                hidden, weight, targets, spec,
                normalizer=9, rows_per_chunk=17, drop_masked=drop, **given,
            )  # fmt: skip
            gradients = torch.autograd.grad(result.loss, (hidden, weight))
            found.append([x.detach() for x in (*result, *gradients)])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [9, 16, 1032])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_a_log_prob_is_never_above_zero(
    on_card: Any, dtype: torch.dtype, vocabulary: int, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(200, vocabulary, generator=generator)
    targets = torch.randint(0, vocabulary, (200,), generator=generator)
    size = 50 + 200 * torch.rand(200, 1, generator=generator)  # beside it the others are nothing
    logits.scatter_(1, targets[:, None], size)
    x, target_ids = on_card.moved(logits.to(dtype)), on_card.moved(targets)
    result = token_loss(x, target_ids, LossSpec(), normalizer=1, temperature=temperature)
    assert (result.logprobs <= 0).all()
    assert (result.logprobs > -5e-5).all()


def test_a_bad_target_or_row_makes_its_own_token_nan(on_card: Any) -> None:
    logits = torch.randn(4, 1030, device=on_card.device)
    logits[1, 1029] = math.nan
    logits.requires_grad_()
    targets = torch.tensor([3, 4, 1030, 5], device=on_card.device)
    result = token_loss(logits, targets, LossSpec(), normalizer=1)
    result.loss.backward()
    assert result.loss.isnan()
    assert result.logprobs.isnan().tolist() == [False, True, True, False]
    assert logits.grad[1:3].isnan().any(1).all()
    assert logits.grad[2].isnan().all()
    assert torch.isfinite(logits.grad[[0, 3]]).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_one_step_needs_no_synchronisation() -> None:
    logits = torch.randn(8, 512, device="cuda", requires_grad=True)
    targets = torch.randint(0, 512, (8,), device="cuda")
    token_loss(logits, targets, LossSpec(), normalizer=8).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        token_loss(logits, targets, LossSpec(), normalizer=8).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
