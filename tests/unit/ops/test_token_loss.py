"""token_loss against plain torch in fp64. Letters: T tokens, V vocabulary."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megarlx.ops.loss_spec import KL_ESTIMATORS, METRICS, MODES, LossSpec, TokenLoss
from megarlx.ops.token_loss import token_loss

FIELD = {name: position for position, name in enumerate(METRICS)}
PER_TOKEN = ("advantages", "old_logprobs", "ref_logprobs", "token_weights")


def reference(
    z: Tensor,
    targets: Tensor,
    spec: LossSpec,
    normalizer: float,
    *,
    mask: Tensor,
    advantages: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    token_weights: Tensor | None,
) -> Tensor:
    """The loss as a sum over tokens of textbook formulas, one token at a time."""
    total = z.new_zeros(())
    for t in torch.nonzero(mask)[:, 0].tolist():
        logp = z[t] - torch.logsumexp(z[t], 0)
        lp = logp[targets[t]]
        entropy = -(logp.exp() * logp).sum()
        if spec.mode == "nll":
            objective = -lp
        else:
            assert advantages is not None
            a = advantages[t]
            ratio = torch.exp(lp - (lp.detach() if old_logprobs is None else old_logprobs[t]))
            clipped = ratio.clamp(1 - spec.clip_low, 1 + spec.clip_high)
            if spec.mode == "reinforce":
                objective = -a * lp
            elif spec.mode == "cispo":
                objective = -clipped.detach() * a * lp
            else:
                surrogate = torch.minimum(ratio * a, clipped * a)
                if spec.dual_clip and a < 0:
                    surrogate = torch.maximum(surrogate, spec.dual_clip * a)
                objective = -surrogate
        value = objective - spec.entropy_coefficient * entropy
        if spec.kl != "none":
            assert ref_logprobs is not None
            gap = ref_logprobs[t] - lp
            kl = {"k1": -gap, "k2": 0.5 * gap**2, "k3": gap.exp() - gap - 1}[spec.kl]
            value = value + spec.kl_coefficient * kl
        weight = 1.0 if token_weights is None else token_weights[t]
        total = total + weight * value
    return total / normalizer


def example(
    spec: LossSpec, tokens: int = 13, vocabulary: int = 37, seed: int = 0, dtype=torch.float64
) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits = normal(tokens, vocabulary) * 1.5
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    lp = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    inputs: dict[str, Tensor | None] = {
        "mask": torch.rand(tokens, generator=generator) > 0.25,
        "advantages": None if spec.mode == "nll" else normal(tokens),
        "old_logprobs": lp + 0.4 * normal(tokens),
        "ref_logprobs": lp + 0.5 * normal(tokens),
        "token_weights": torch.rand(tokens, generator=generator, dtype=torch.float64) + 0.5,
    }
    cast = {k: v if v is None or k == "mask" else v.to(dtype) for k, v in inputs.items()}
    return logits.to(dtype).requires_grad_(), targets, cast


def grid() -> list[LossSpec]:
    return [
        LossSpec(mode, 0.2, 0.3, dual, kl, 0.0 if kl == "none" else 0.37, entropy)
        for mode in MODES
        for kl in KL_ESTIMATORS
        for entropy in (0.0, 0.21)
        for dual in ((0.0, 1.4) if mode == "ppo_clip" else (0.0,))
    ]


def name(spec: LossSpec) -> str:
    return f"{spec.mode}-{spec.kl}-{spec.entropy_coefficient}-{spec.dual_clip}"


@pytest.mark.parametrize("spec", grid(), ids=name)
def test_loss_and_gradient_equal_the_textbook_formula(spec: LossSpec) -> None:
    logits, targets, inputs = example(spec)
    ours = token_loss(logits, targets, spec, normalizer=7.5, temperature=0.8, **inputs)
    expected = reference(logits / 0.8, targets, spec, 7.5, **inputs)
    torch.testing.assert_close(ours.loss, expected, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(ours.loss, logits)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("spec", grid(), ids=name)
def test_gradcheck_in_fp64(spec: LossSpec) -> None:
    logits, targets, inputs = example(spec, tokens=5, vocabulary=9)
    if spec.mode == "cispo":  # its value is not its antiderivative: the clipped ratio is constant
        inputs["old_logprobs"] = inputs["old_logprobs"] - 5.0  # every ratio is at the upper clip

    def loss(x: Tensor) -> Tensor:
        return token_loss(x, targets, spec, normalizer=3.0, temperature=1.3, **inputs).loss

    assert torch.autograd.gradcheck(loss, (logits,))


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("edge", [0.8, 1.3, 2.0])
@pytest.mark.parametrize("side", [-1e-6, 1e-6])
@pytest.mark.parametrize("mode", ["ppo_clip", "cispo"])
def test_each_side_of_each_clip_edge(mode: str, advantage: float, edge: float, side: float) -> None:
    spec = LossSpec(mode, 0.2, 0.3, dual_clip=2.0 if mode == "ppo_clip" else 0.0)
    ratio = edge + side
    logits = torch.tensor([[0.3, -0.2, 0.9]], dtype=torch.float64, requires_grad=True)
    lp = logits.log_softmax(-1)[0, 1]
    a = torch.tensor([advantage], dtype=torch.float64)
    old = (lp.detach() - math.log(ratio)).reshape(1)
    result = token_loss(
        logits, torch.tensor([1]), spec, normalizer=1, advantages=a, old_logprobs=old
    )
    (gradient,) = torch.autograd.grad(result.loss, logits)
    (of_logprob,) = torch.autograd.grad(lp, logits)
    if mode == "cispo":
        used = min(max(ratio, 0.8), 1.3)
        slope, clips, value = -used * advantage, used != ratio, -used * advantage * lp.item()
    else:
        if advantage > 0:
            clips, used = ratio > 1.3, min(ratio, 1.3)
        else:
            clips, used = ratio < 0.8 or ratio > 2.0, min(max(ratio, 0.8), 2.0)
        slope, value = 0.0 if clips else -ratio * advantage, -used * advantage
    torch.testing.assert_close(gradient, slope * of_logprob, rtol=1e-9, atol=1e-12)
    assert result.loss.item() == pytest.approx(value, rel=1e-12)
    assert result.metrics[FIELD["clip_fraction"]].item() == clips


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 2, 7, 33, 1024, 1027, 5003])
def test_weight_one_nll_is_cross_entropy(dtype: torch.dtype, vocabulary: int) -> None:
    torch.manual_seed(vocabulary)
    logits = (torch.randn(11, vocabulary) * 3).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (11,))
    precise = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(precise, targets)
    expected.backward()
    result = token_loss(logits, targets, LossSpec(), normalizer=11)
    result.loss.backward()
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    assert result.loss.item() == pytest.approx(expected.item(), rel=tolerance, abs=tolerance)
    of_gradient = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-4}[dtype]
    difference = (logits.grad.double() - precise.grad).abs().max().item()
    assert difference <= of_gradient
    assert result.logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    logp = precise.detach().log_softmax(-1)
    torch.testing.assert_close(
        result.entropy.double(), -(logp.exp() * logp).sum(-1), rtol=1e-5, atol=1e-5
    )


def test_metrics_are_the_sums_over_unmasked_tokens() -> None:
    spec = LossSpec("ppo_clip", 0.1, 0.1, kl="k3", kl_coefficient=0.1)
    logits, targets, inputs = example(spec, tokens=40)
    result = token_loss(logits, targets, spec, normalizer=1, **inputs)
    mask = inputs["mask"]
    logp = logits.detach().log_softmax(-1)
    lp = logp.gather(1, targets[:, None])[:, 0][mask]
    ratio = (lp - inputs["old_logprobs"][mask]).exp()
    ref = inputs["ref_logprobs"][mask] - lp
    a = inputs["advantages"][mask]
    expected = {
        "tokens": mask.sum(),
        "clip_fraction": (((a > 0) & (ratio > 1.1)) | ((a < 0) & (ratio < 0.9))).sum(),
        "kl": (ref.exp() - 1 - ref).sum(),
        "old_kl": (ratio - 1 - ratio.log()).sum(),
        "ratio": ratio.sum(),
        "nll": -lp.sum(),
        "entropy": -(logp.exp() * logp).sum(-1)[mask].sum(),
        "ratio_max": ratio.max(),
    }
    for key, value in expected.items():
        assert result.metrics[FIELD[key]].item() == pytest.approx(value.item(), rel=1e-9), key
    assert expected["clip_fraction"] > 0
    torch.testing.assert_close(result.logprobs[mask], lp)
    assert (result.logprobs[~mask] == 0).all()
    assert (result.entropy[~mask] == 0).all()


@pytest.mark.parametrize("spec", [LossSpec(), LossSpec("ppo_clip", kl="k3", kl_coefficient=1.0)])
def test_batch_without_tokens_has_loss_and_gradient_zero(spec: LossSpec) -> None:
    logits, targets, inputs = example(spec, dtype=torch.float32)
    inputs["mask"] = torch.zeros_like(inputs["mask"])
    normalizer = inputs["mask"].sum()
    result = token_loss(logits, targets, spec, normalizer=normalizer, **inputs)
    result.loss.backward()
    assert result.loss.item() == 0
    assert (logits.grad == 0).all()
    assert (result.metrics == 0).all()


def test_masked_tokens_may_hold_anything() -> None:
    spec = LossSpec("reinforce", entropy_coefficient=0.1)
    logits, targets, inputs = example(spec)
    mask = inputs["mask"]
    clean = token_loss(logits, targets, spec, normalizer=2, **inputs)
    (expected,) = torch.autograd.grad(clean.loss, logits)
    dirty = logits.detach().clone()
    dirty[~mask] = math.nan
    targets[~mask] = -100
    inputs["advantages"][~mask] = math.inf
    inputs["old_logprobs"][~mask] = math.nan
    dirty.requires_grad_()
    result = token_loss(dirty, targets, spec, normalizer=2, **inputs)
    result.loss.backward()
    assert torch.equal(result.loss, clean.loss)
    assert torch.equal(dirty.grad, expected)
    assert (dirty.grad[~mask] == 0).all()


def test_ids_from_vocab_size_on_are_padding() -> None:
    logits, targets, _ = example(LossSpec(), vocabulary=29)
    padded = F.pad(logits.detach(), (0, 11), value=1e4).requires_grad_()
    result = token_loss(padded, targets, LossSpec(), normalizer=1, vocab_size=29)
    plain = token_loss(logits, targets, LossSpec(), normalizer=1)
    result.loss.backward()
    plain.loss.backward()
    torch.testing.assert_close(result.loss, plain.loss)
    torch.testing.assert_close(padded.grad[:, :29], logits.grad)
    assert (padded.grad[:, 29:] == 0).all()


def test_logits_of_minus_infinity_have_no_probability_and_no_gradient() -> None:
    spec = LossSpec("reinforce", entropy_coefficient=0.3)
    logits, targets, inputs = example(spec)
    keep = torch.rand(logits.shape) > 0.5
    keep.scatter_(1, targets[:, None], True)
    cut = logits.detach().masked_fill(~keep, -math.inf).requires_grad_()
    finite = logits.detach().masked_fill(~keep, -1e5).requires_grad_()
    for x in (cut, finite):
        token_loss(x, targets, spec, normalizer=1, **inputs).loss.backward()
    assert torch.isfinite(cut.grad).all()
    torch.testing.assert_close(cut.grad, finite.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("position", [0, 5, 1029])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_with_nan_or_infinity_is_nan_and_alone(
    dtype: torch.dtype, position: int, value: float
) -> None:
    logits = torch.randn(3, 1030).to(dtype)
    logits[1, position] = value
    logits.requires_grad_()
    targets = torch.tensor([3, 4, 5])
    result = token_loss(logits, targets, LossSpec(), normalizer=1)
    assert result.loss.isnan()
    assert result.logprobs.isnan().tolist() == [False, True, False]
    result.loss.backward()
    assert logits.grad[1].isnan().any()
    assert torch.isfinite(logits.grad[[0, 2]]).all()


def test_without_old_logprobs_the_ratio_is_one_with_a_gradient() -> None:
    logits, targets, inputs = example(LossSpec("ppo_clip"))
    given = {"advantages": inputs["advantages"], "normalizer": 4}
    clipped = token_loss(logits, targets, LossSpec("ppo_clip"), **given)
    plain = token_loss(logits, targets, LossSpec("reinforce"), **given)
    assert clipped.loss.item() == pytest.approx(-inputs["advantages"].sum().item() / 4)
    assert clipped.metrics[FIELD["ratio_max"]] == 1
    (a,) = torch.autograd.grad(clipped.loss, logits)
    (b,) = torch.autograd.grad(plain.loss, logits)
    torch.testing.assert_close(a, b)


def test_rerun_is_bitwise_equal_and_rows_do_not_see_each_other() -> None:
    spec = LossSpec("cispo", kl="k2", kl_coefficient=0.1, entropy_coefficient=0.01)
    logits, targets, inputs = example(spec, tokens=64, vocabulary=1999, dtype=torch.float32)

    def run(order: Tensor) -> tuple[TokenLoss, Tensor]:
        x = logits.detach()[order].requires_grad_()
        moved = {key: value[order] for key, value in inputs.items()}
        result = token_loss(x, targets[order], spec, normalizer=9, **moved)
        result.loss.backward()
        return result, x.grad

    identity, shuffled = torch.arange(64), torch.randperm(64)
    (first, gradient), (again, second_gradient) = run(identity), run(identity)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(gradient, second_gradient)
    moved, moved_gradient = run(shuffled)
    assert torch.equal(moved.logprobs, first.logprobs[shuffled])
    assert torch.equal(moved_gradient, gradient[shuffled])


def test_upstream_gradient_scales_and_graph_may_be_kept() -> None:
    logits, targets, _ = example(LossSpec())
    loss = token_loss(logits, targets, LossSpec(), normalizer=3).loss
    (one,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (again,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (half,) = torch.autograd.grad(loss * 0.5, logits)
    torch.testing.assert_close(one, again, rtol=0, atol=0)
    torch.testing.assert_close(half, one * 0.5)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("count", "offset"), [(0, 0), (1, 0), (7, 0), (4099, 0), (4099, 1)])
@pytest.mark.parametrize("factor", [1.0, 0.3, -2.0, math.nan])
def test_scaling_equals_torch_bit_for_bit(
    dtype: torch.dtype, count: int, offset: int, factor: float
) -> None:
    around = torch.randn(count + 16).to(dtype)
    expected = around.clone()
    number = torch.tensor(factor, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    expected[offset : offset + count] *= number.to(dtype)
    torch.ops.megarlx._scale_gradient_(around[offset : offset + count], number)
    assert torch.equal(around.isnan(), expected.isnan())
    assert torch.equal(around.nan_to_num(7), expected.nan_to_num(7))


def test_a_factor_of_one_leaves_even_the_bits_that_a_product_would_change() -> None:
    signalling = torch.tensor([0x7F800001, 0x3F800000], dtype=torch.int32).repeat(700)
    gradient = signalling.clone().view(torch.float32)
    torch.ops.megarlx._scale_gradient_(gradient, torch.tensor(1.0))
    assert torch.equal(gradient.view(torch.int32), signalling)
    torch.ops.megarlx._scale_gradient_(gradient, torch.tensor(1.5))
    assert not torch.equal(gradient.view(torch.int32)[::2], signalling[::2])


def test_opcheck_of_scaling() -> None:
    op = torch.ops.megarlx._scale_gradient_
    for factor in (1.0, 2.0):
        torch.library.opcheck(op, (torch.rand(5, 3), torch.tensor(factor)))
    with pytest.raises(ValueError, match="factor's dtype is Double; allowed: Float"):
        op(torch.rand(3), torch.ones((), dtype=torch.float64))


def test_gradient_added_to_two_uses_of_the_logits() -> None:
    logits, targets, _ = example(LossSpec())
    (once,) = torch.autograd.grad(
        token_loss(logits, targets, LossSpec(), normalizer=1).loss, logits
    )
    base = logits.detach().requires_grad_()
    x = base * 1.0
    loss = token_loss(x, targets, LossSpec(), normalizer=1).loss + x.sum()
    (both,) = torch.autograd.grad(loss, base)
    torch.testing.assert_close(both, once + 1)


def test_a_second_derivative_is_refused() -> None:
    logits, targets, _ = example(LossSpec())
    loss = token_loss(logits, targets, LossSpec(), normalizer=1).loss
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_without_gradient_mode_no_gradient_is_computed() -> None:
    logits, targets, _ = example(LossSpec())
    with torch.no_grad():
        result = token_loss(logits, targets, LossSpec(), normalizer=1)
    assert not result.loss.requires_grad
    numbers = (torch.ones((), dtype=torch.float64),) * 2
    op = torch.ops.megarlx.token_loss
    out = op(logits.detach(), targets, *[None] * 5, *numbers, 37, *LossSpec().arguments, False)
    assert out[4].numel() == 0


def test_leading_dimensions_rows_with_a_stride_and_tensor_numbers() -> None:
    wide = torch.randn(2, 5, 40, dtype=torch.float64)
    view = wide[:, :, :17]
    targets = torch.randint(0, 17, (2, 5))
    count, degree = torch.tensor(10), torch.tensor(0.7)
    result = token_loss(view, targets, LossSpec(), normalizer=count, temperature=degree)
    degree = degree.double()
    expected = F.cross_entropy((view / degree).reshape(10, 17), targets.reshape(10))
    torch.testing.assert_close(result.loss, expected)
    assert result.logprobs.shape == (2, 5)


def test_empty_batch() -> None:
    logits = torch.randn(0, 7, requires_grad=True)
    result = token_loss(logits, torch.zeros(0, dtype=torch.int64), LossSpec(), normalizer=0)
    result.loss.backward()
    assert result.loss == 0
    assert logits.grad.shape == (0, 7)


# A GPU would have to be waited for to see these; there such a token is NaN.
VALUE = pytest.mark.not_emulated("CUDA does not look at values: they make NaN")


@pytest.mark.parametrize(
    "change",
    [
        *(pytest.param(name, marks=VALUE) for name in ("target", "low", "temperature")),
        *("advantages", "shape"),
    ],
)
def test_error_names_argument_value_and_what_is_allowed(change: str) -> None:
    logits, targets, _ = example(LossSpec(), tokens=4)
    arguments: dict = {"normalizer": 1}
    if change == "target":
        targets[2] = 37
        message = r"token_loss: targets\[2\] is 37; allowed: 0 to 36"
    elif change == "low":
        targets[3] = -100
        message = r"targets\[3\] is -100; allowed: 0 to 36, or any id where mask is false"
    elif change == "temperature":
        arguments["temperature"] = torch.tensor(-0.5)
        message = r"temperature is -0.5; allowed: a number > 0"
    elif change == "advantages":
        arguments["advantages"] = torch.zeros(4)
        message = "advantages is given; allowed: one a token for a policy loss"
    else:
        targets = targets[:3]
        message = r"targets's shape is \(3,\); allowed: \(4,\)"
    with pytest.raises(ValueError, match=message):
        token_loss(logits, targets, LossSpec(), **arguments)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mode", "ppo"),
        ("kl", "k4"),
        ("clip_low", -0.1),
        ("clip_high", math.nan),
        ("dual_clip", 0.5),
        ("kl_coefficient", 0.1),
        ("entropy_coefficient", math.inf),
        ("clip_low", "0.2"),
        ("z_loss", -1.0),
    ],
)
def test_spec_refuses_a_wrong_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"LossSpec: {field} is .*; allowed: "):
        LossSpec(**{field: value})
    with pytest.raises(dataclasses.FrozenInstanceError):
        LossSpec().mode = "nll"


BAD_VALUES = [None, 3, -1.0, math.nan, "x", True, torch.zeros(()), torch.zeros(3), torch.ones(4)]
BAD_VALUES += [torch.zeros(4, 4), torch.zeros(4, dtype=torch.int64), torch.ones(4, 6).t()]
BAD_VALUES += [torch.zeros(4, dtype=torch.bool), torch.zeros(4, dtype=torch.complex64)]
BAD_VALUES += [torch.zeros(4, device="meta"), torch.full((4,), 9), torch.zeros(4, 6).half()]
BAD_VALUES += [torch.zeros(4, 6), torch.zeros(0), torch.zeros(0, 0), torch.zeros(2, 2, 6)]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_argument_works_or_raises_an_error_that_names_it(data: st.DataObject) -> None:
    mode = data.draw(st.sampled_from(MODES))
    arguments: dict = {
        "logits": torch.randn(4, 6),
        "targets": torch.tensor([0, 5, 2, 3]),
        "spec": LossSpec(mode),
        "normalizer": 4,
        "mask": None,
        "advantages": None if mode == "nll" else torch.randn(4),
        "old_logprobs": torch.randn(4),
        "ref_logprobs": None,
        "token_weights": None,
        "temperature": 1.0,
        "vocab_size": None,
    }
    changed = data.draw(st.lists(st.sampled_from(sorted(arguments)), max_size=3, unique=True))
    for key in changed:
        arguments[key] = BAD_VALUES[data.draw(st.integers(0, len(BAD_VALUES) - 1))]
    try:
        result = token_loss(**arguments)
    except ValueError as error:
        message = str(error)
    else:
        assert result.loss.shape == ()
        return
    assert changed
    assert "megarlx.token_loss: " in message
    assert "; allowed: " in message
    assert any(key in message for key in arguments)


def op_arguments(spec: LossSpec, dtype: torch.dtype, with_gradient: bool) -> tuple:
    logits, targets, inputs = example(spec, tokens=6, vocabulary=10, dtype=dtype)
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    values = [v if v is None or k == "mask" else v.to(precision) for k, v in inputs.items()]
    numbers = (torch.tensor(2.0, dtype=precision), torch.tensor(0.9, dtype=precision))
    if not with_gradient:
        logits = logits.detach()
    return (logits, targets, *values, *numbers, 10, *spec.arguments, with_gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("with_gradient", [True, False])
def test_opcheck_token_loss(dtype: torch.dtype, with_gradient: bool) -> None:
    spec = LossSpec("ppo_clip", kl="k1", kl_coefficient=0.1, entropy_coefficient=0.1)
    arguments = op_arguments(spec, dtype, with_gradient)
    torch.library.opcheck(torch.ops.megarlx.token_loss, arguments)


def test_compiled_function_gives_the_same_loss_and_gradient() -> None:
    logits, targets, _ = example(LossSpec(), dtype=torch.float32)

    def loss(x: Tensor) -> Tensor:
        return token_loss(x * 2, targets, LossSpec(), normalizer=5.0).loss * 3

    (expected,) = torch.autograd.grad(loss(logits), logits)
    compiled = torch.compile(loss, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(logits), logits)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocabulary", [9, 16, 1032])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_a_token_that_is_certain_has_a_log_prob_of_no_more_than_zero(
    dtype: torch.dtype, vocabulary: int, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(200, vocabulary, generator=generator)
    targets = torch.randint(0, vocabulary, (200,), generator=generator)
    size = 50 + 200 * torch.rand(200, 1, generator=generator)  # beside it the others are nothing
    logits.scatter_(1, targets[:, None], size)
    result = token_loss(
        logits.to(dtype), targets, LossSpec(), normalizer=1, temperature=temperature
    )
    assert (result.logprobs <= 0).all()
    assert (result.logprobs > -5e-5).all()
