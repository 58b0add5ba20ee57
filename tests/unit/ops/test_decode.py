"""The kernels of a decode step against their definitions in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megarlx.ops.decode import decode_attention_, decode_norm_, decode_swiglu_

TOLERANCE = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
}
DTYPES = [torch.float32, torch.float64]


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 16, 52, 192])
def test_norms_and_swiglu_equal_their_definitions(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(width)
    x, y = torch.randn(5, width, dtype=dtype), torch.randn(5, width, dtype=dtype)
    weight = torch.rand(width, dtype=dtype)
    behind, before, out = x.clone(), x.clone(), torch.empty_like(x)
    decode_norm_(behind, y, weight, 1e-6)
    torch.testing.assert_close(behind.double(), x + normed(y, weight, 1e-6), **TOLERANCE[dtype])
    decode_norm_(before, y, weight, 1e-6, out)
    torch.testing.assert_close(before, x + y)
    torch.testing.assert_close(out.double(), normed(x + y, weight, 1e-6), **TOLERANCE[dtype])
    decode_norm_(before, None, weight, 1e-6, out)
    torch.testing.assert_close(before, x + y)
    gate_up = torch.randn(5, 2 * width, dtype=dtype) * 4
    decode_swiglu_(gate_up, out)
    gate, up = gate_up.double().chunk(2, -1)
    torch.testing.assert_close(out.double(), gate * gate.sigmoid() * up, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["none", "per_head", "full", "given"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(4, 4, 10), (6, 2, 48), (3, 1, 64), (1, 1, 2), (2, 2, 136)]
)
def test_attention_step_equals_its_definition(
    heads: int, kv_heads: int, dim: int, norm: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(dim)
    slots, positions = torch.tensor([3, 0, 5, 1]), torch.tensor([0, 38, 17, 5])
    keys, values = (torch.randn(6, 40, kv_heads, dim, dtype=dtype) for _ in range(2))
    qkv = torch.randn(4, (heads + 2 * kv_heads) * dim, dtype=dtype)
    angle = torch.rand(40, dim // 2, dtype=dtype) * 6
    full = norm in ("full", "given")
    weights: dict[str, Tensor] = {}
    if norm != "none":
        weights["q_weight"] = torch.rand(heads * dim if full else dim, dtype=dtype)
        weights["k_weight"] = torch.rand(kv_heads * dim if full else dim, dtype=dtype)
    if norm == "given":
        weights["inverse"] = torch.rand(4, 2, dtype=dtype)
    out = torch.full((4, heads * dim), 7.0, dtype=dtype)
    old_keys, old_values = keys.clone(), values.clone()
    decode_attention_(
        qkv, keys, values, None, slots, positions, angle.cos(), angle.sin(), out,
        scale=0.3, rows=3, eps=1e-6, **weights,
    )  # fmt: skip
    for row in range(3):
        slot, position = int(slots[row]), int(positions[row])
        q, k, v = qkv[row].double().split((heads * dim, kv_heads * dim, kv_heads * dim))
        if norm == "full":
            q, k = (normed(x, weights[w], 1e-6) for x, w in ((q, "q_weight"), (k, "k_weight")))
        if norm == "given":
            q = q * weights["inverse"][row, 0] * weights["q_weight"]
            k = k * weights["inverse"][row, 1] * weights["k_weight"]
        q, k, v = (x.view(-1, dim) for x in (q, k, v))
        if norm == "per_head":
            q, k = (normed(x, weights[w], 1e-6) for x, w in ((q, "q_weight"), (k, "k_weight")))
        turn = torch.polar(torch.ones(dim // 2).double(), angle[position].double())
        q, k = (
            torch.view_as_real(torch.complex(*x.chunk(2, -1)) * turn).movedim(-1, 1).flatten(1)
            for x in (q, k)
        )
        seen_k = torch.cat((old_keys[slot, :position].double(), k[None]))
        seen_v = torch.cat((old_values[slot, :position].double(), v[None]))
        shared = heads // kv_heads
        scores = torch.einsum("hd,thd->ht", q, seen_k.repeat_interleave(shared, 1)) * 0.3
        expected = torch.einsum(
            "ht,thd->hd", scores.softmax(-1), seen_v.repeat_interleave(shared, 1)
        )
        torch.testing.assert_close(out[row].double().view(-1, dim), expected, **TOLERANCE[dtype])
        torch.testing.assert_close(keys[slot, position].double(), k, **TOLERANCE[dtype])
        assert torch.equal(values[slot, position], v.to(dtype))
        old_keys[slot, position], old_values[slot, position] = keys[slot, position], v
    assert (out[3] == 7).all(), "a row of padding was worked on"
    assert torch.equal(keys, old_keys)
    assert torch.equal(values, old_values)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("positions", torch.tensor([1, 8]), "positions is 8; allowed: 0 to 7"),
        ("slots", torch.tensor([-1, 0]), "slots is -1; allowed: 0 to 2"),
        ("table", torch.tensor([[0, 0, 0], [0, 0, 3]]).int(), "table is page 3; allowed: 0 to 2"),
        ("table", torch.tensor([[0, 0, 0], [2, 0, 0]]).int(), "table is 2 shared; allowed: 0 to 1"),
        ("qkv", torch.zeros(2, 23), r"qkv is of shape \[2, 23\]"),
        ("cosines", torch.zeros(7, 2), "cosines is of shape"),
        ("rows", 3, "rows is 3; allowed: 0 to 2"),
        ("q_weight", torch.ones(4), "k_weight is missing"),
    ],
)
def test_wrong_arguments_are_refused_by_name_and_value(
    name: str, value: object, message: str
) -> None:
    arguments: dict = {
        "qkv": torch.zeros(2, 24),
        "keys": torch.zeros(3, 8, 2, 4),
        "values": torch.zeros(3, 8, 2, 4),
        "table": None,
        "slots": torch.tensor([0, 1]),
        "positions": torch.tensor([0, 1]),
        "cosines": torch.zeros(8, 2),
        "sines": torch.zeros(8, 2),
        "out": torch.zeros(2, 8),
        "scale": 1.0,
        "rows": 2,
    }
    with pytest.raises(ValueError, match=message):
        decode_attention_(**{**arguments, name: value})


def test_schemas_and_fake_kernels_are_right() -> None:
    x, y, w = torch.randn(3, 8), torch.randn(3, 8), torch.rand(8)
    torch.library.opcheck(
        torch.ops.megarlx.decode_norm_.default, (x, y, w, 1e-6, torch.empty(3, 8))
    )
    torch.library.opcheck(torch.ops.megarlx.decode_norm_.default, (x, y, w, 1e-6, None))
    torch.library.opcheck(torch.ops.megarlx.decode_swiglu_.default, (torch.randn(3, 16), x))
    torch.library.opcheck(
        torch.ops.megarlx.decode_attention_.default,
        (
            torch.randn(2, 24), torch.zeros(3, 8, 2, 4), torch.zeros(3, 8, 2, 4), None,
            torch.tensor([0, 1]), torch.tensor([0, 1]), torch.zeros(8, 2), torch.zeros(8, 2),
            None, None, None, 1e-6, 1.0, 2, torch.zeros(2, 8),
        ),
    )  # fmt: skip
