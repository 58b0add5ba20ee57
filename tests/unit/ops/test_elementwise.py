"""RMSNorm, SwiGLU and the attention's heads against torch, in their values and their gradients.

Letters: T rows or tokens, d a normalised width, H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from other_processes import INSTRUCTION_SETS, passed_on, start_tests
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megarlx.ops.elementwise import (
    attention_heads,
    attention_heads_reference,
    rms_norm,
    rms_norm_reference,
    swiglu,
    swiglu_reference,
)

EPS = 1e-5
RELATIVE = {torch.float32: 1e-6, torch.float64: 1e-14}
DTYPES = list(RELATIVE)
Function = Callable[..., Tensor | tuple[Tensor, ...]]


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)


def with_gradients(function: Function, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Results, then the gradient of every input under the same upstream gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    upstream = [normal(*r.shape, dtype=r.dtype, seed=9 + i) for i, r in enumerate(results)]
    gradients = torch.autograd.grad(results, leaves, upstream)
    return [*(r.detach() for r in results), *gradients]


def relative(found: Tensor, wanted: Tensor) -> float:
    if wanted.numel() == 0:
        return 0.0
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-300))


def assert_same(function: Function, reference: Function, inputs: tuple[Tensor, ...]) -> None:
    """To the precision of the dtype, against the reference in fp64."""
    dtype = inputs[0].dtype
    found = with_gradients(function, inputs)
    wanted = with_gradients(reference, tuple(x.double() for x in inputs))
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.dtype == dtype
        assert a.shape == b.shape
        assert relative(a.double(), b) <= RELATIVE[dtype], f"result {i}"


def norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    return rms_norm(x, weight, EPS, residual)


def norm_reference(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    return rms_norm_reference(x, weight, EPS, residual)


def heads_case(
    kind: str, dtype: torch.dtype, tokens: int = 71, h: int = 4, k: int = 2, dim: int = 22
) -> tuple[Function, Function, tuple[Tensor, ...]]:
    """The op, its reference and their inputs: the projection and the weights of its norms."""
    angles = normal(tokens, 1, dim // 2, seed=3)
    qkv = normal(tokens, (h + 2 * k) * dim, dtype=dtype)
    sizes = {"none": (), "full": (h * dim, k * dim), "per_head": (dim, dim)}[kind]
    weights = [normal(n, dtype=dtype, seed=5 + i) for i, n in enumerate(sizes)]
    # both see the same cosines, rounded to the dtype
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def call(function: Callable[..., tuple[Tensor, ...]]) -> Function:
        def called(qkv: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
            names = ("q_weight", "k_weight")
            named = dict(zip(names, weights, strict=True)) if weights else {}
            turn = (cos.to(qkv.dtype), sin.to(qkv.dtype))
            return function(qkv, *turn, h, k, **named, eps=EPS)

        return called

    return call(attention_heads), call(attention_heads_reference), (qkv, *weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [3, 7, 16, 37, 192])
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 300])
def test_rms_norm_is_torchs(dtype: torch.dtype, width: int, rows: int) -> None:
    inputs = (normal(rows, width, dtype=dtype), normal(width, dtype=dtype, seed=1))
    assert_same(norm, norm_reference, inputs)
    assert_same(norm, norm_reference, (*inputs, normal(rows, width, dtype=dtype, seed=2)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_takes_any_leading_dimensions(dtype: torch.dtype) -> None:
    inputs = (normal(3, 5, 9, dtype=dtype), normal(9, dtype=dtype, seed=1))
    assert_same(norm, norm_reference, (*inputs, normal(3, 5, 9, dtype=dtype, seed=2)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 5, 16, 33, 160])
def test_swiglu_is_torchs(dtype: torch.dtype, width: int) -> None:
    assert_same(swiglu, swiglu_reference, (3 * normal(77, 2 * width, dtype=dtype),))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_of_huge_gates_is_zero_or_the_product(dtype: torch.dtype) -> None:
    gate_up = torch.tensor([[-200.0, 200.0, -1e4, 1e4, 2.0, 3.0, 5.0, 7.0]], dtype=dtype)
    gate_up.requires_grad_()
    out = swiglu(gate_up)
    torch.testing.assert_close(out, torch.tensor([[0, 600, 0, 7e4]], dtype=dtype))
    (gradient,) = torch.autograd.grad(out.sum(), gate_up)
    expected = torch.tensor([[0, 3, 0, 7, 0, 200, 0, 1e4]], dtype=dtype)
    torch.testing.assert_close(gradient, expected)


def test_swiglu_of_nan_is_nan() -> None:
    gate_up = torch.tensor([[torch.nan, 1.0, 2.0, 3.0]]).requires_grad_()
    out = swiglu(gate_up)
    (gradient,) = torch.autograd.grad(out.sum(), gate_up)
    assert out.isnan().tolist() == [[True, False]]
    assert gradient.isnan().tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "full", "per_head"])
@pytest.mark.parametrize(
    "shape", [(4, 2, 22), (2, 2, 32), (3, 1, 6), (1, 1, 2), (4, 4, 48)], ids=str
)
def test_heads_are_torchs(dtype: torch.dtype, kind: str, shape: tuple[int, int, int]) -> None:
    assert_same(*heads_case(kind, dtype, 130, *shape))


def test_one_query_head_beside_several_key_heads_is_normalised_head_by_head() -> None:
    op, reference, inputs = heads_case("per_head", torch.float64, 9, 1, 3, 10)
    assert_same(op, reference, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 2, 22), (2, 1, 32)], ids=str)
def test_a_norm_is_made_of_its_sums(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """The sums that ranks exchange, here of one rank alone, give what is computed without them."""
    h, k, dim = shape
    _, _, (qkv, *weights) = heads_case("full", dtype, 71, *shape)
    turn = [normal(71, 1, dim // 2, dtype=dtype, seed=i) for i in (3, 4)]
    given = (qkv, *weights, *turn)
    q, keys, inverse = ops._heads(*given, h, k, EPS)
    sums = ops._heads_sums(qkv, h, k)
    for a, b in zip(ops._heads(*given, h, k, EPS, 3 * sums, 3), (q, keys, inverse), strict=True):
        assert relative(a, b) <= 4 * RELATIVE[dtype]
    grads = [normal(*x.shape, dtype=dtype, seed=8) for x in (q, keys, keys)]
    wanted = ops._heads_backward(*grads, *given, inverse, True)
    products = ops._heads_backward_sums(*grads[:2], *given)
    found = ops._heads_backward(*grads, *given, inverse, True, 3 * products, 3)
    for a, b in zip(found, wanted, strict=True):
        assert relative(a, b) <= 4 * RELATIVE[dtype]


def test_turned_heads_keep_their_length() -> None:
    op, _, (qkv,) = heads_case("none", torch.float64)
    q, k, v = op(qkv)
    plain_q, plain_k, plain_v = qkv.unflatten(1, (8, 22)).split((4, 2, 2), dim=1)
    torch.testing.assert_close(q.norm(dim=-1), plain_q.norm(dim=-1))
    torch.testing.assert_close(k.norm(dim=-1), plain_k.norm(dim=-1))
    assert torch.equal(v, plain_v)
    assert v.data_ptr() == plain_v.data_ptr()


def cases(dtype: torch.dtype, tokens: int = 71) -> dict[str, tuple[Function, tuple[Tensor, ...]]]:
    x, weight = normal(tokens, 37, dtype=dtype), normal(37, dtype=dtype, seed=1)
    found: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
        "norm": (norm, (x, weight)),
        "norm_residual": (norm, (x, weight, normal(tokens, 37, dtype=dtype, seed=2))),
        "swiglu": (swiglu, (normal(tokens, 46, dtype=dtype),)),
    }
    for kind in ("none", "full", "per_head"):
        op, _, inputs = heads_case(kind, dtype, tokens)
        found[f"heads_{kind}"] = (op, inputs)
    return found


NAMES = list(cases(torch.float32))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_differences(name: str) -> None:
    function, inputs = cases(torch.float64, tokens=5)[name]
    leaves = [x.detach().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_need_not_be_contiguous(name: str, dtype: torch.dtype) -> None:
    function, inputs = cases(dtype)[name]
    expected = with_gradients(function, inputs)

    def column_major(*given: Tensor) -> Tensor | tuple[Tensor, ...]:
        return function(*(x.t().contiguous().t() if x.dim() == 2 else x for x in given))

    def rows_apart(*given: Tensor) -> Tensor | tuple[Tensor, ...]:
        wide = [F.pad(x, (3, 4))[:, 3:-4] if x.dim() == 2 else x for x in given]
        assert len(wide[0]) == 1 or not wide[0].is_contiguous()
        return function(*wide)

    for changed in (column_major, rows_apart):
        for a, b in zip(with_gradients(changed, inputs), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_upstream_gradients_need_not_be_contiguous(name: str) -> None:
    function, inputs = cases(torch.float64)[name]
    expected = with_gradients(function, inputs)

    def transposed(*given: Tensor) -> tuple[Tensor, ...]:
        results = function(*given)
        results = results if isinstance(results, tuple) else (results,)
        return tuple(r.transpose(0, 1) for r in results)

    leaves = [x.detach().requires_grad_() for x in inputs]
    results = transposed(*leaves)
    plain = [r.transpose(0, 1) for r in results]
    upstream = [normal(*r.shape, seed=9 + i).transpose(0, 1) for i, r in enumerate(plain)]
    gradients = torch.autograd.grad(results, leaves, upstream)
    for a, b in zip(gradients, expected[-len(leaves) :], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_give_no_rows_and_zero_gradients_of_weights(name: str) -> None:
    function, inputs = cases(torch.float32, tokens=0)[name]
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    assert all(r.shape[0] == 0 for r in results)
    gradients = torch.autograd.grad(sum(r.sum() for r in results), leaves)
    assert [g.shape for g in gradients] == [x.shape for x in leaves]
    assert all(not g.any() for g in gradients)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_bit_depends_on_the_run_or_on_the_number_of_threads(
    name: str, dtype: torch.dtype
) -> None:
    function, inputs = cases(dtype, tokens=2000)[name]
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(with_gradients(function, inputs))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_backward_may_run_twice_and_under_recomputation(name: str) -> None:
    function, inputs = cases(torch.float64)[name]
    leaves = [x.detach().requires_grad_() for x in inputs]

    def total(*given: Tensor) -> Tensor:
        results = function(*given)
        results = results if isinstance(results, tuple) else (results,)
        return sum(((r * r).sum() for r in results), torch.zeros(()))

    loss = total(*leaves)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    recomputed = torch.autograd.grad(checkpoint(total, *leaves, use_reentrant=False), leaves)
    for a, b, c in zip(first, again, recomputed, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("swiglu", "heads_none")])
def test_gradients_of_inputs_alone_are_the_same_as_with_weights(name: str) -> None:
    """Split schedules ask for them in two passes."""
    function, inputs = cases(torch.float64)[name]
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    loss = sum(r.square().sum() for r in results)
    together = torch.autograd.grad(loss, leaves, retain_graph=True)
    (alone,) = torch.autograd.grad(loss, leaves[:1], retain_graph=True)
    weights = torch.autograd.grad(loss, leaves[1:])
    assert torch.equal(alone, together[0])
    assert all(torch.equal(a, b) for a, b in zip(weights, together[1:], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_frozen_weights_and_inputs_get_no_gradient(name: str) -> None:
    function, inputs = cases(torch.float64)[name]
    expected = with_gradients(function, inputs)
    first = inputs[0].detach().requires_grad_()
    results = function(first, *inputs[1:])
    results = results if isinstance(results, tuple) else (results,)
    upstream = [normal(*r.shape, seed=9 + i) for i, r in enumerate(results)]
    (gradient,) = torch.autograd.grad(results, first, upstream)
    assert torch.equal(gradient, expected[len(results)])
    with torch.no_grad():
        plain = function(*inputs)
    plain = plain if isinstance(plain, tuple) else (plain,)
    assert all(torch.equal(a, b) for a, b in zip(plain, expected, strict=False))


@pytest.mark.parametrize("name", NAMES)
def test_a_second_derivative_is_refused(name: str) -> None:
    function, inputs = cases(torch.float64)[name]
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    loss = sum(r.square().sum() for r in results)
    with pytest.raises(RuntimeError, match="create_graph is True; allowed: False"):
        torch.autograd.grad(
            torch.autograd.grad(loss, leaves[0], create_graph=True)[0].sum(), leaves[0]
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_take_torchs_kernels(dtype: torch.dtype) -> None:
    x, weight = normal(5, 8, dtype=dtype), normal(8, dtype=dtype, seed=1)
    assert torch.equal(norm(x, weight), F.rms_norm(x, (8,), weight, EPS))
    assert torch.equal(norm(x, weight, x), x + F.rms_norm(x, (8,), weight, EPS))
    found, wanted = (with_gradients(f, (x,)) for f in (swiglu, swiglu_reference))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


ops = torch.ops.megarlx
X, W = torch.ones(3, 4), torch.ones(4)
QKV, TURN = torch.ones(3, 16), torch.ones(3, 1, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.rms_norm(X.half(), W, EPS), "rms_norm: x's dtype is Half; allowed: float32"),
        (lambda: ops.rms_norm(X[0], W, EPS), r"x's shape is \[4\]; allowed: \[rows, width\]"),
        (lambda: ops.rms_norm(X, W[:3], EPS), r"weight's shape is \[3\]; allowed: \[4\]"),
        (lambda: ops.rms_norm(X, W.double(), EPS), "weight's dtype is Double; allowed: Float"),
        (lambda: ops.rms_norm(X, W, -1.0), "eps is -1; allowed: a number >= 0"),
        (lambda: ops.rms_norm(X, W, EPS, X[:2]), r"residual's shape is \[2, 4\]"),
        (lambda: ops.rms_norm_backward(X[:2], X, W, W[:3], True), r"grad's shape is \[2, 4\]"),
        (lambda: ops.rms_norm_backward(X, X, W, W, True), r"inverse's shape is \[4\]"),
        (lambda: ops.swiglu(torch.ones(2, 3)), r"gate_up's shape is \[2, 3\]"),
        (lambda: ops.swiglu_backward(X, X), r"grad's shape is \[3, 4\]; allowed: \[3, 2\]"),
        (lambda: attention_heads(QKV, TURN, TURN, 0, 1), "heads is 0; allowed: "),
        (lambda: attention_heads(QKV, TURN, TURN, 3, 1), r"qkv's shape is \[3, 16\]"),
        (lambda: attention_heads(QKV, TURN[:2], TURN, 2, 1), r"cos's shape is \[2, 1, 2\]"),
        (lambda: attention_heads(QKV, TURN, TURN, 2, 1, q_weight=W), "k_weight is missing"),
        (lambda: ops._heads_sums(QKV, 0, 1), "_heads_sums: heads is 0; allowed"),
        (
            lambda: ops._heads(QKV, None, None, TURN, TURN, 2, 1, EPS, torch.ones(3, 2)),
            "sums is given; allowed: none where no norm spans the heads",
        ),
        (
            lambda: ops._heads(QKV, None, None, TURN, TURN, 2, 1, EPS, None, 0),
            "ranks is 0; allowed: an integer > 0",
        ),
        (
            lambda: attention_heads(QKV, TURN, TURN, 2, 1, q_weight=W, k_weight=W[:3]),
            r"k_weight's shape is \[3\]; allowed: \[4\]",
        ),
    ],
)
def test_bad_inputs_are_named_with_what_is_allowed(
    call: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    check = torch.library.opcheck
    x, weight = normal(6, 5, dtype=dtype), normal(5, dtype=dtype)
    gate_up, residual = normal(6, 10, dtype=dtype), normal(6, 5, dtype=dtype, seed=1)
    for requires_grad in (False, True):
        for tensor in (x, weight, gate_up, residual):
            tensor.requires_grad_(requires_grad)
        check(ops.rms_norm, (x, weight, EPS))
        check(ops.rms_norm, (x, weight, EPS, residual))
        check(ops.swiglu, (gate_up,))
    x, weight, gate_up = x.detach(), weight.detach(), gate_up.detach()
    _, inverse = ops.rms_norm(x, weight, EPS)
    for with_weight in (False, True):
        check(ops.rms_norm_backward, (x, x, weight, inverse, with_weight))
    check(ops.swiglu_backward, (x, gate_up))
    qkv, turn = normal(6, 16, dtype=dtype), normal(6, 1, 2, dtype=dtype)
    for sizes in ((), (8, 4), (4, 4)):
        weights = [normal(n, dtype=dtype) for n in sizes] or [None, None]
        check(ops._heads, (qkv, *weights, turn, turn, 2, 1, EPS))
        q, k, inverse = ops._heads(qkv, *weights, turn, turn, 2, 1, EPS)
        given = (q, k, k.clone(), qkv, *weights, turn, turn, inverse)
        for with_weights in {False, bool(sizes)}:
            check(ops._heads_backward, (*given, with_weights))
        if sizes == (8, 4):
            check(ops._heads_sums, (qkv, 2, 1))
            check(ops._heads_backward_sums, given[:2] + given[3:-1])
            sums = ops._heads_sums(qkv, 2, 1)
            check(ops._heads, (qkv, *weights, turn, turn, 2, 1, EPS, sums, 2))
            check(ops._heads_backward, (*given, True, sums, 2))


def test_every_instruction_set_is_right() -> None:
    chosen = "torchs or contiguous or huge or nan"
    runs = [start_tests(name, __file__, chosen) for name in INSTRUCTION_SETS]
    ran = {passed_on(run) for run in runs}
    if len(ran) < 2:
        pytest.skip(f"this CPU runs only {ran}")
