"""Products in fp32 on a CPU and the linear layer made of them, against fp64.

Letters: M rows, K depth, N columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from other_processes import INSTRUCTION_SETS, passed_on, printed_with_threads, start_tests
from torch import Tensor

from megarlx.ops import native
from megarlx.ops.product import is_own, linear, product, product_

ops = torch.ops.megarlx
RELATIVE = 1e-6
# one more and one less than tiles, panels and blocks of depth have
SIZES = [
    *itertools.product((1, 13, 15, 33), (1, 16, 65), (1, 31, 48)),
    *((200, 64, 97), (64, 513, 160), (31, 257, 600), (300, 1030, 33)),
    *((0, 5, 7), (7, 0, 5), (5, 7, 0)),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, wanted: Tensor) -> bool:
    """In the norm, to what a sum of products is rounded to."""
    return bool((found.double() - wanted).norm() <= RELATIVE * wanted.norm().clamp_min(1e-30))


@pytest.fixture
def always_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine's library is, and whatever is faster here."""
    told = native.Native("", {}, own_products=True)
    monkeypatch.setattr(native, "load", lambda: told)


def layouts(x: Tensor) -> list[Tensor]:
    """The same matrix by rows, by columns, as a part of a wider one, and neither."""
    rows, columns = x.shape
    wide, thin = x.new_zeros(rows, columns + 3), x.new_zeros(2 * rows, 2 * columns)
    wide[:, 1:-2] = x
    thin[::2, ::2] = x
    return [x, x.t().contiguous().t(), wide[:, 1:-2], thin[::2, ::2]]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_is_the_product_of_matrices_that_lie_anyhow(size: tuple[int, int, int]) -> None:
    m, k, n = size
    a, b = normal(m, k), normal(k, n, seed=1)
    wanted, before = a.double() @ b.double(), normal(m, n, seed=2)
    for left, right in itertools.product(layouts(a), layouts(b)):
        out = torch.full((m, n), torch.nan)
        ops.product_(out, left, right, False)
        assert close(out, wanted)
        out = before.clone()
        ops.product_(out, left, right, True)
        assert close(out, wanted + before)


@pytest.mark.parametrize("k", [1, 64, 255, 257, 700])
@pytest.mark.parametrize("n", [5, 64, 75])
def test_an_elements_bits_are_its_rows_and_its_columns_alone(k: int, n: int) -> None:
    x, weight = normal(300, k), normal(n, k, seed=1)
    whole = ops.linear(x, weight, None)
    for begin, end in ((0, 1), (7, 9), (1, 17), (100, 131), (40, 250)):
        assert torch.equal(ops.linear(x[begin:end], weight, None), whole[begin:end])
    for begin, end in ((0, 1), (1, 4), (3, n)):
        part = ops.linear(x, weight[begin:end], None)
        assert torch.equal(part, whole[:, begin:end])
    by_columns = ops.linear(x.t().contiguous().t(), weight.t().contiguous().t(), None)
    assert torch.equal(by_columns, whole)


THREADS = """
import sys, torch
from megarlx.ops import native
native.load()
torch.set_num_threads(int(sys.argv[1]))
draw = torch.Generator().manual_seed(0)
for m, k, n in ((2048, 64, 192), (64, 2048, 64), (500, 700, 33), (20, 900, 900), (1500, 3, 1)):
    a, b = (torch.randn(s, generator=draw) for s in ((m, k), (k, n)))
    out = torch.zeros(m, n)
    torch.ops.megarlx.product_(out, a, b, False)
    print(hash(out.numpy().tobytes()))
"""


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    found = printed_with_threads(THREADS)
    assert len(found[0].split()) == 5
    assert found[0] == found[1] == found[2]


@pytest.mark.usefixtures("always_own")
@pytest.mark.parametrize("shape", [(40,), (3, 17), (0,), ()], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("asked", [(0,), (1,), (0, 1)], ids=str)
def test_a_linear_layer_and_its_gradients(
    shape: tuple[int, ...], with_bias: bool, asked: tuple[int, ...]
) -> None:
    leaves = [normal(*shape, 24), normal(19, 24, seed=1)]
    if with_bias:
        leaves.append(normal(19, seed=2))
        asked = (*asked, 2)
    upstream = normal(*shape, 19, seed=3)

    def results(layer: Callable[..., Tensor], double: bool) -> list[Tensor]:
        mine = [x.double() if double else x.clone() for x in leaves]
        for index in asked:
            mine[index].requires_grad_()
        out = layer(*mine)
        grads = torch.autograd.grad(out, [mine[i] for i in asked], upstream.to(out.dtype))
        return [out.detach(), *grads]

    for a, b in zip(results(linear, False), results(F.linear, True), strict=True):
        assert a.shape == b.shape
        assert a.dtype == torch.float32
        assert close(a, b)


@pytest.mark.usefixtures("always_own")
def test_an_upstream_gradient_may_be_expanded() -> None:
    x, weight = normal(6, 5).requires_grad_(), normal(3, 5, seed=1).requires_grad_()
    linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(6, 5))
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(3, 5))


def test_other_types_and_devices_stay_with_torch() -> None:
    x, weight = normal(6, 5).double(), normal(3, 5, seed=1).double()
    assert not is_own(x)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    out = torch.ones(6, 3, dtype=torch.float64)
    product_(out, x, weight.t(), add=True)
    assert torch.equal(out, torch.addmm(torch.ones_like(out), x, weight.t()))
    product_(out, x, weight.t())
    assert torch.equal(out, x @ weight.t())
    assert torch.equal(product(x, weight.t()), x @ weight.t())
    assert not is_own(x.float().to("meta"))


@pytest.mark.usefixtures("always_own")
def test_a_compiled_layer_has_the_same_bits() -> None:
    x, weight = normal(6, 5), normal(3, 5, seed=1)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, weight), linear(x, weight))


def test_backward_has_no_derivative() -> None:
    x, weight = normal(2, 3).requires_grad_(), normal(4, 3)
    out = ops.linear(x, weight, None)
    with pytest.raises(RuntimeError, match="create_graph is True; allowed: False"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(2)}, r"a's shape is \[2\]; allowed: a matrix"),
        ({"b": torch.zeros(4, 3)}, r"b's shape is \[4, 3\]; allowed: \[5, columns\]"),
        ({"b": torch.zeros(5, 3).double()}, "b's dtype is Double; allowed: float32"),
        ({"out": torch.zeros(3, 2)}, r"out's shape is \[3, 2\]; allowed: \[2, 3\]"),
        ({"out": torch.zeros(3, 2).t()}, r"out's strides is \[1, 2\]; allowed: contiguous"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    given = {"out": torch.zeros(2, 3), "a": torch.zeros(2, 5), "b": torch.zeros(5, 3), **change}
    with pytest.raises(ValueError, match=f"megarlx.product_: {message}"):
        ops.product_(*given.values(), False)


def test_the_result_may_not_lie_where_an_operand_does() -> None:
    x = torch.zeros(4, 4)
    with pytest.raises(RuntimeError, match="refer to a single memory location"):
        ops.product_(x, x, torch.zeros(4, 4), False)


def test_opcheck() -> None:
    check = torch.library.opcheck
    x, weight, bias = normal(6, 5), normal(3, 5, seed=1), normal(3, seed=2)
    for requires_grad in (False, True):
        for tensor in (x, weight, bias):
            tensor.requires_grad_(requires_grad)
        check(ops.linear, (x, weight, None))
        check(ops.linear, (x.view(2, 3, 5), weight, bias))
    check(ops.product_, (torch.zeros(6, 3), x.detach(), weight.detach().t(), True))


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_instruction_set_is_right(name: str) -> None:
    assert passed_on(start_tests(name, __file__, "lie_anyhow or bits_are or gradients"))
