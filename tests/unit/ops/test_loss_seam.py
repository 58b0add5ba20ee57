"""The two ops around a policy loss, the seam between them, and the loop that calls both.

Letters: n tokens, d hidden, V vocabulary.
"""

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megarlx.ops.linear_token_loss import linear_token_loss
from megarlx.ops.loss_spec import KL_ESTIMATORS, LossSpec
from megarlx.ops.policy_loss import (
    NATIVE,
    LossTokens,
    PolicyLoss,
    policy_loss,
    ratio,
    reinforce,
    sequence_mean,
)
from megarlx.ops.token_loss import token_loss

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def tokens_of(count: int, vocabulary: int, seed: int = 5) -> tuple[Tensor, dict[str, Any]]:
    """(targets, the other inputs): sequences one after another, of which masked tokens are too."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, vocabulary, (count,), generator=generator)
    return targets, {
        "mask": torch.rand(count, generator=generator) > 0.3,
        "advantages": normal(count, seed=seed + 1),
        "old_logprobs": normal(count, seed=seed + 2) / 2 - math.log(vocabulary),
        "ref_logprobs": normal(count, seed=seed + 3) / 2 - math.log(vocabulary),
        "token_weights": normal(count, seed=seed + 4).abs() + 0.5,
        "rollout_logprobs": normal(count, seed=seed + 5) / 2 - math.log(vocabulary),
        "sequence": torch.arange(count) * 4 // max(count, 1),
        "sequences": 4,
    }


@policy_loss(needs="sequence", metrics=("far",))
def of_sequences(t: LossTokens, logprob: Tensor, entropy: Tensor, c: Any) -> Any:
    """Not linear in anything, and of all that a loss may look at."""
    assert t.rollout is not None
    mean = sequence_mean(t, logprob - t.old)
    away = sequence_mean(t, (logprob - t.rollout) ** 2)
    return mean.exp() * t.advantages + away * entropy, {"far": away > 0.5}


# The two ops.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [7, 40, 1031])
def test_token_loss_sums_and_gradient(dtype: torch.dtype, vocabulary: int) -> None:
    """Over two shards of unequal rows, of which the last holds padding."""
    width, heat = -(-vocabulary // 2) + 3, torch.tensor(0.8, dtype=torch.float64)
    logits = F.pad(2 * normal(11, vocabulary), (0, 2 * width - vocabulary), value=50.0).to(dtype)
    targets, inputs = tokens_of(11, vocabulary)
    mask, precision = inputs["mask"], torch.promote_types(dtype, torch.float32)
    targets[~mask] = -100
    by = [normal(11, seed=seed).to(precision) for seed in (2, 3, 4)]
    z = (logits.double()[:, :vocabulary] / heat).requires_grad_()
    logp = z.log_softmax(1)
    lp = logp.gather(1, targets.where(mask, 0)[:, None])[:, 0]
    parts = (lp, -(logp.exp() * logp).sum(1), z.logsumexp(1))
    total = sum(
        (slope.double() * part).where(mask, 0).sum() for slope, part in zip(by, parts, strict=True)
    )
    expected = torch.autograd.grad(total, z)[0] / heat
    # logits of masked rows do not matter
    logits[~mask] = math.nan

    ops, one = torch.ops.megarlx, heat.to(precision)
    shards = [logits[:, i * width : (i + 1) * width] for i in range(2)]
    partials = [ops.token_loss_sums(s, targets, mask, one, i * width, vocabulary)
                for i, s in enumerate(shards)]  # fmt: skip
    largest = torch.maximum(partials[0][0], partials[1][0])
    sums = [(p[1] * (p[0] - largest).exp(), p[3]) for p in partials]
    log_z = largest + (sums[0][0] + sums[1][0]).log()
    close = (
        {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    )
    torch.testing.assert_close(log_z[mask].double(), parts[2].detach()[mask], **close)
    found_lp = sums[0][1] + sums[1][1] - log_z
    torch.testing.assert_close(found_lp[mask].double(), lp.detach()[mask], **close)
    for p in partials:
        assert (p[:, ~mask] == 0).all()

    from megarlx.ops.token_loss import move_to_maximum_

    whole = sum(move_to_maximum_(p, largest) for p in partials)
    whole[0] = largest
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-3}[dtype]
    for i, shard in enumerate(shards):
        of_rows = (whole, targets, mask, *by, one, i * width, vocabulary)
        into = torch.full(shard.shape, 7.0).to(dtype)
        before = shard.clone()
        ops.token_loss_gradient_(shard, *of_rows, into)
        assert torch.equal(shard.nan_to_num(3.0), before.nan_to_num(3.0))
        here = expected[:, i * width : (i + 1) * width]
        here = F.pad(here, (0, width - here.shape[1]))
        assert (into.double() - here).norm() <= bound * (1 + here.norm())
        assert (into[~mask] == 0).all()
        in_place = shard.clone()
        ops.token_loss_gradient_(in_place, *of_rows)
        assert torch.equal(in_place, into)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_of_the_two_ops(dtype: torch.dtype) -> None:
    logits = normal(9, 14).to(dtype)
    targets, inputs = tokens_of(9, 13)
    precision = torch.promote_types(dtype, torch.float32)
    one, ops = torch.ones((), dtype=precision), torch.ops.megarlx
    by = [normal(9, seed=seed).to(precision) for seed in (2, 3, 4)]
    for mask in (None, inputs["mask"]):
        torch.library.opcheck(ops.token_loss_sums, (logits, targets, mask, one, 0, 13))
        partials = ops.token_loss_sums(logits, targets, mask, one, 0, 13)
        arguments = (logits.clone(), partials, targets, mask, *by, one, 0, 13)
        torch.library.opcheck(ops.token_loss_gradient_, arguments)
        torch.library.opcheck(ops.token_loss_gradient_, (*arguments, torch.empty_like(logits)))


@pytest.mark.parametrize("argument", ["by_logprob", "by_entropy", "by_log_z", "partials"])
def test_the_gradients_op_names_what_it_refuses(argument: str) -> None:
    names = ("partials", "targets", "mask", "by_logprob", "by_entropy", "by_log_z")
    values = (torch.rand(4, 6), torch.zeros(6).long(), None, *[torch.rand(6)] * 3)
    given = dict(zip(names, values, strict=True))
    given[argument] = torch.rand(5)
    with pytest.raises(ValueError, match=rf"token_loss_gradient_: {argument}'s shape is \[5\]"):
        torch.ops.megarlx.token_loss_gradient_(
            torch.rand(6, 8), *given.values(), torch.ones(()), 0, 8
        )


# A function in the op's place.


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("rows", [4, 1000])
@pytest.mark.parametrize("kl", KL_ESTIMATORS)
@pytest.mark.parametrize("mode", ["reinforce", "ppo_clip", "cispo"])
def test_one_call_equals_the_function(mode: str, kl: str, rows: int, drop: bool) -> None:
    settings = {
        "clip_low": 0.2,
        "clip_high": 0.3,
        "dual_clip": 1.4 if mode == "ppo_clip" else 0.0,
        "kl": kl,
        "kl_coefficient": 0.0 if kl == "none" else 0.3,
        "entropy_coefficient": 0.1,
        "z_loss": 0.01,
    }
    hidden, weight = normal(23, 5).requires_grad_(), normal(31, 5, seed=2).requires_grad_()
    targets, inputs = tokens_of(23, 31)
    found = []
    for spec in (
        LossSpec(mode, **settings),
        LossSpec(NATIVE[mode], settings=SimpleNamespace(**settings), **settings),
    ):
        result = linear_token_loss(
            hidden, weight, targets, spec, normalizer=7.0, temperature=0.9,
            rows_per_chunk=rows, drop_masked=drop, **inputs,
        )  # fmt: skip
        found.append((*result, *torch.autograd.grad(result.loss, (hidden, weight))))
        logits = (hidden @ weight.t()).detach().requires_grad_()
        of_logits = token_loss(logits, targets, spec, normalizer=7.0, temperature=0.9, **inputs)
        found.append((*of_logits, *found[-1][4:]))
        gradient = torch.autograd.grad(of_logits.loss, logits)[0]
        torch.testing.assert_close(gradient @ weight, found[-1][4], rtol=1e-10, atol=1e-12)
    assert mode == "reinforce" or found[0][3][1] > 0  # something is clipped
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_without_old_logprobs_a_functions_ratio_is_one_with_a_gradient() -> None:
    hidden, weight = normal(23, 5).requires_grad_(), normal(31, 5, seed=2)
    targets, inputs = tokens_of(23, 31)
    inputs["old_logprobs"] = None
    found = []
    for loss in (NATIVE["ppo_clip"], reinforce):
        spec = LossSpec(loss, settings=LossSpec())
        result = linear_token_loss(hidden, weight, targets, spec, normalizer=3.0, **inputs)
        found.append(torch.autograd.grad(result.loss, hidden)[0])
        assert result.metrics[7] == 1
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


def test_ratio() -> None:
    """Value and slope, also beyond ±80 and at infinities; and of both arguments."""
    infinity = math.inf
    gaps = [0.0, -0.0, 1.5, -3.0, 79.0, 81.0, -81.0, 1e6, -1e6, infinity, -infinity]
    a = torch.tensor(gaps, dtype=torch.float64, requires_grad=True)
    b = torch.full_like(a, 0.25).detach().requires_grad_()
    value = ratio(a, b)
    expected = [math.exp(min(max(gap - 0.25, -80.0), 80.0)) for gap in gaps]
    torch.testing.assert_close(value.tolist(), expected, rtol=1e-14, atol=0)
    upstream = torch.arange(1.0, 12.0, dtype=torch.float64)
    slopes = torch.autograd.grad(value, (a, b), upstream)
    torch.testing.assert_close(slopes[0], upstream * value.detach(), rtol=1e-14, atol=0)
    assert torch.equal(slopes[1], -slopes[0])
    assert ratio(torch.tensor(math.nan), 0.0).isnan()
    assert ratio(a.float(), b.float()).isfinite().all()
    inside = torch.tensor([-2.0, 0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ratio, (inside, torch.zeros_like(inside).requires_grad_()))


# The seam.


def greedy(t: LossTokens, logprob: Tensor, entropy: Tensor, c: Any) -> Tensor:
    """NaN, in value and gradient, wherever the advantage is 0: as it is where tokens are masked."""
    return -logprob * t.advantages * (t.advantages / t.advantages) + (t.old / t.advantages) * 0


def test_the_seam_masks_before_and_selects_after() -> None:
    targets, inputs = tokens_of(23, 31)
    mask = inputs["mask"]
    weight = normal(31, 5, seed=2).requires_grad_()
    clean = normal(23, 5).requires_grad_()
    seen: list[LossTokens] = []

    def watched(t: LossTokens, logprob: Tensor, entropy: Tensor, c: Any) -> Tensor:
        seen.append(t)
        assert (logprob[t.sequence == -1] == 0).all()
        assert torch.is_grad_enabled()
        assert logprob.is_leaf
        return greedy(t, logprob, entropy, c)

    spec = LossSpec(PolicyLoss(watched, needs_sequence=True), kl="k3", kl_coefficient=0.1)
    plain = linear_token_loss(clean, weight, targets, spec, normalizer=3.0, **inputs)
    expected = torch.autograd.grad(plain.loss, (clean, weight))
    assert all(g.isfinite().all() for g in expected)
    dirty = clean.detach().clone()
    dirty[~mask] = math.nan
    dirty.requires_grad_()
    spoilt = {k: v.masked_fill(~mask, math.nan) if torch.is_tensor(v) and v.is_floating_point()
              else v for k, v in inputs.items()}  # fmt: skip
    for drop in (True, False):
        for rows in (4, 1000):
            result = linear_token_loss(
                dirty, weight, targets.masked_fill(~mask, -100), spec,
                normalizer=3.0, drop_masked=drop, rows_per_chunk=rows, **spoilt,
            )  # fmt: skip
            torch.testing.assert_close(result, plain, rtol=1e-12, atol=1e-12)
            found = torch.autograd.grad(result.loss, (dirty, weight))
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    t = seen[-1]
    hidden_from_it = (t.advantages, t.old, t.rollout, t.reference)
    assert all((value[~mask] == 0).all() for value in hidden_from_it if value is not None)
    assert t.sequence is not None
    assert (t.sequence[~mask] == -1).all()
    nothing = linear_token_loss(clean, weight, targets, spec, normalizer=0.0, **inputs)
    assert nothing.loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(nothing.loss, (clean, weight)))
    inputs["mask"] = torch.zeros_like(mask)
    for drop in (True, False):
        empty = linear_token_loss(
            clean, weight, targets, spec, normalizer=0.0, drop_masked=drop, **inputs
        )
        assert (empty.loss, empty.metrics.abs().sum()) == (0, 0)
        assert all((g == 0).all() for g in torch.autograd.grad(empty.loss, (clean, weight)))


def test_native_losses_keep_masked_hidden_rows_out_of_the_weights_gradient() -> None:
    targets, inputs = tokens_of(23, 31)
    spec, mask = LossSpec("ppo_clip"), inputs["mask"]
    hidden, weight = normal(23, 5), normal(31, 5, seed=2).requires_grad_()
    found = []
    for fill in (0.0, math.nan):
        x = hidden.masked_fill(~mask[:, None], fill).requires_grad_()
        result = linear_token_loss(
            x, weight, targets, spec, normalizer=3.0, drop_masked=False, rows_per_chunk=4, **inputs
        )
        found.append(torch.autograd.grad(result.loss, (x, weight)))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kl", KL_ESTIMATORS)
def test_loss_and_gradient_of_any_function_are_autograds(kl: str, dtype: torch.dtype) -> None:
    coefficient = 0.0 if kl == "none" else 0.3
    spec = LossSpec(
        of_sequences, kl=kl, kl_coefficient=coefficient, entropy_coefficient=0.2, z_loss=0.05
    )
    hidden = normal(29, 5).to(dtype).requires_grad_()
    weight = normal(31, 5, seed=2).to(dtype).requires_grad_()
    targets, inputs = tokens_of(29, 31)
    mask = inputs["mask"]
    x, w = (value.detach().double().requires_grad_() for value in (hidden, weight))
    z = (x @ w.t()) / 0.9
    logp = z.log_softmax(1)
    lp = logp.gather(1, targets[:, None])[:, 0][mask]
    entropy = -(logp.exp() * logp).sum(1)[mask]
    kept = {k: v[mask] if torch.is_tensor(v) else v for k, v in inputs.items()}
    t = LossTokens(
        *(kept[k] for k in ("advantages", "old_logprobs", "rollout_logprobs", "ref_logprobs")),
        kept["sequence"], 4,
    )  # fmt: skip
    objective, _ = of_sequences(t, lp, entropy, None)
    gap = t.reference - lp
    estimate = {"none": 0 * gap, "k1": -gap, "k2": gap**2 / 2, "k3": gap.exp() - 1 - gap}[kl]
    each = objective + coefficient * estimate - 0.2 * entropy + 0.05 * z.logsumexp(1)[mask] ** 2
    expected = (kept["token_weights"] * each).sum() / 7
    expected_gradients = torch.autograd.grad(expected, (x, w))
    bound = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 1e-2}[dtype]
    for rows in (6, 1000):
        result = linear_token_loss(
            hidden, weight, targets, spec,
            normalizer=7.0, temperature=0.9, rows_per_chunk=rows, **inputs,
        )  # fmt: skip
        assert result.loss.item() == pytest.approx(expected.item(), rel=bound)
        assert result.metrics.shape == (9,)
        found = torch.autograd.grad(result.loss, (hidden, weight))
        for a, b in zip(found, expected_gradients, strict=True):
            assert (a.double() - b).norm() <= bound * b.norm()


@pytest.mark.parametrize("rows", [5, 1000])
@pytest.mark.parametrize("mode", ["nll", "ppo_clip"])
def test_z_loss(mode: str, rows: int) -> None:
    """One call and the loop in Python (over shards: tests/distributed)."""
    targets, inputs = tokens_of(23, 31)
    advantages = inputs["advantages"] if mode == "ppo_clip" else None
    inputs = {"mask": inputs["mask"], "token_weights": inputs["token_weights"]}
    hidden, weight = normal(23, 5).requires_grad_(), normal(31, 5, seed=2).requires_grad_()
    z = hidden @ weight.t()
    each = (0.3 * z.logsumexp(1) ** 2 * inputs["token_weights"]).where(inputs["mask"], 0)
    expected = torch.autograd.grad(each.sum() / 7, (hidden, weight))
    for function in (False, True):
        if function and mode == "nll":
            continue
        kind = NATIVE[mode] if function else mode
        losses = []
        for z_loss in (0.3, 0.0):
            spec = LossSpec(kind, z_loss=z_loss, settings=LossSpec() if function else None)
            losses.append(
                linear_token_loss(
                    hidden,
                    weight,
                    targets,
                    spec,
                    advantages=advantages,
                    normalizer=7.0,
                    rows_per_chunk=rows,
                    **inputs,
                )
            )
        difference = losses[0].loss - losses[1].loss
        assert difference.item() == pytest.approx(each.sum().item() / 7, rel=1e-11)
        for a, b in zip(torch.autograd.grad(difference, (hidden, weight)), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert torch.equal(losses[0].metrics, losses[1].metrics)
    logits = z.detach().requires_grad_()
    found = token_loss(logits, targets, LossSpec(z_loss=0.3), normalizer=7.0, **inputs).loss
    plain = token_loss(logits, targets, LossSpec(), normalizer=7.0, **inputs).loss
    gradient = torch.autograd.grad(found - plain, logits)[0]
    torch.testing.assert_close(gradient @ weight, expected[0], rtol=1e-10, atol=1e-12)


# The loop.


class Products(TorchFunctionMode):
    """Counts the rows of matrix products, those into the weight's gradient, and the largest tensor
    that an op made."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: Counter[str] = Counter()
        self.into_weight = 0
        self.largest = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("mm", "matmul", "addmm", "addmm_"):
            left, right = args[-2:]
            of_logits = left.shape[1] == 5 and right.shape == (5, 31)
            kind = "logits" if of_logits else "hidden" if right.shape == (31, 5) else "weight"
            self.rows[kind] += left.shape[1] if kind == "weight" else left.shape[0]
            self.into_weight += kind == "weight"
        if torch.is_tensor(made):
            self.largest = max(self.largest, made.numel())
        return made


@pytest.mark.parametrize(
    ("loss", "rows", "logits"),
    [(reinforce, 4, 23), (reinforce, 1000, 23), (of_sequences, 1000, 23), (of_sequences, 4, 46)],
)
def test_products_of_a_loss_are_counted(loss: PolicyLoss, rows: int, logits: int) -> None:
    """Three for losses of single tokens and for one chunk; a fourth for sequences in several.
    Never are there more logits than a chunk's unless all may be kept, and then the weight's
    gradient is one product; and the result is the same."""
    targets, inputs = tokens_of(23, 31)
    del inputs["mask"]
    hidden, weight = normal(23, 5).requires_grad_(), normal(31, 5, seed=2).requires_grad_()
    spec = LossSpec(loss)
    whole = linear_token_loss(hidden, weight, targets, spec, normalizer=3.0, **inputs)
    expected = torch.autograd.grad(whole.loss, (hidden, weight))
    for mib in (0, 1):
        with Products() as products:
            result = linear_token_loss(
                hidden, weight, targets, spec,
                normalizer=3.0, rows_per_chunk=rows, kept_gradients_mib=mib, **inputs,
            )  # fmt: skip
        assert products.rows == {"logits": logits, "hidden": 23, "weight": 23}
        assert products.into_weight == (1 if mib else -(-23 // rows))
        assert (products.largest == 23 * 31) == (rows > 23 or mib == 1)
        torch.testing.assert_close(result, whole, rtol=1e-12, atol=1e-13)
        found = torch.autograd.grad(result.loss, (hidden, weight))
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    with Products() as products, torch.no_grad():
        linear_token_loss(
            hidden, weight, targets, spec, normalizer=3.0, rows_per_chunk=rows, **inputs
        )
    assert products.rows == {"logits": 23}


@pytest.mark.not_emulated("fake kernels are those of the CPU's ops")
@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize("loss", ["nll", "ppo_clip", reinforce, of_sequences])
def test_the_loop_has_no_data_dependent_shape(loss: Any, into: bool) -> None:
    """On the meta device a number that depends on data would raise."""
    with torch.device("meta"):
        hidden, weight = (torch.empty(n, 5, requires_grad=True) for n in (23, 31))
        count = torch.empty(23, dtype=torch.int64)
        floats = ["old_logprobs", "ref_logprobs", "token_weights", "rollout_logprobs"]
        floats += [] if loss == "nll" else ["advantages"]
        result = linear_token_loss(
            hidden, weight, count, LossSpec(loss, kl="k3", kl_coefficient=0.1, z_loss=0.1),
            normalizer=torch.empty(()), temperature=torch.empty(()), mask=count > 0,
            sequence=count, sequences=4, rows_per_chunk=4, drop_masked=False,
            weight_grad_=torch.empty(31, 5) if into else None,
            **{name: torch.empty(23) for name in floats},
        )  # fmt: skip
        result.loss.backward()
        assert hidden.grad.shape == (23, 5)
        assert result.logprobs.shape == (23,)


def test_a_weight_gradient_of_a_function_is_added_to_a_buffer() -> None:
    targets, inputs = tokens_of(23, 31)
    hidden, weight = normal(23, 5).requires_grad_(), normal(31, 5, seed=2).requires_grad_()
    common = {"normalizer": 3.0, "rows_per_chunk": 4, **inputs}
    loss = linear_token_loss(hidden, weight, targets, LossSpec(of_sequences), **common).loss
    expected = torch.autograd.grad(loss, (hidden, weight))
    buffer = torch.full_like(weight, 2.0).detach()
    linear_token_loss(
        hidden, weight, targets, LossSpec(of_sequences), weight_grad_=buffer, **common
    ).loss.backward()
    torch.testing.assert_close(hidden.grad, expected[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(buffer, expected[1] + 2.0, rtol=1e-12, atol=1e-12)
    assert weight.grad is None


@pytest.mark.parametrize(("tokens", "products"), [(4228, 1), (4229, 5)])
def test_gradients_are_kept_where_all_fit(tokens: int, products: int) -> None:
    """4,228 rows of 31 numbers of 8 bytes are 32 bytes less than 1 MiB."""
    targets, inputs = tokens_of(tokens, 31)
    del inputs["mask"]
    hidden, weight = normal(tokens, 5).requires_grad_(), normal(31, 5, seed=2)
    with Products() as seen:
        linear_token_loss(
            hidden, weight.requires_grad_(), targets, LossSpec(reinforce),
            normalizer=3.0, rows_per_chunk=1000, kept_gradients_mib=1, **inputs,
        )  # fmt: skip
    assert seen.into_weight == products


# What is refused.


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda t, lp, h, c: lp.sum(), r"float64 \[\]; allowed: an objective a token, .* \[23\]"),
        (lambda t, lp, h, c: -lp.float(), r"is torch.float32 \[23\]; allowed: .* torch.float64"),
        (lambda t, lp, h, c: None, "is a NoneType; allowed: a tensor of objectives"),
        (lambda t, lp, h, c: (-lp, {"far": lp}), r"metrics in .* is \['far'\]; allowed: .* \[\]"),
        (policy_loss(metrics=("far",))(lambda t, lp, h, c: -lp), r"allowed: .* \['far'\]"),
        (
            policy_loss(metrics=("far",))(lambda t, lp, h, c: (-lp, {"far": lp.sum()})),
            r"far in the result .* is \[\]; allowed: \[23\]",
        ),
    ],
)
def test_another_result_is_refused(loss: Any, message: str) -> None:
    targets, inputs = tokens_of(23, 31)
    inputs["mask"] = None
    with pytest.raises(ValueError, match=message):
        linear_token_loss(
            normal(23, 5), normal(31, 5), targets, LossSpec(PolicyLoss.of(loss)),
            normalizer=1, **inputs,
        )  # fmt: skip


def test_what_a_loss_of_sequences_needs_is_named() -> None:
    targets, inputs = tokens_of(23, 31)
    for missing in ({"sequence": None}, {"sequences": 0}):
        with pytest.raises(ValueError, match=r"sequence is .*; allowed: the number of each"):
            linear_token_loss(
                normal(23, 5), normal(31, 5), targets, LossSpec(of_sequences),
                normalizer=1, **{**inputs, **missing},
            )  # fmt: skip
    for wrong in ("kl", "loss/mine"):
        with pytest.raises(ValueError, match="policy_loss: a metric is"):
            policy_loss(metrics=(wrong,))
    with pytest.raises(ValueError, match="policy_loss: needs is 'batch'; allowed: 'sequence'"):
        policy_loss(needs="batch")  # type: ignore[arg-type]


def test_a_plain_function_is_a_loss_of_single_tokens() -> None:
    assert PolicyLoss.of(greedy) == PolicyLoss(greedy)
    assert PolicyLoss.of(greedy).name == "greedy"
    assert PolicyLoss.of(reinforce) is reinforce
    assert replace(LossSpec(reinforce)).metrics == LossSpec("reinforce").metrics
