"""A whole decode step: its definition in fp64, and bits that depend on nothing but the row."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megarlx.ops.decode import (
    PackedHead,
    PackedLayers,
    decode_step_,
    packed,
    packed_gate_up,
    panel_columns,
)

L, S, M, V = 2, 40, 48, 75
EPS = 1e-6


@dataclass
class Case:
    """Plain weights of L layers, a cache that is filled with noise, and rows at mixed places."""

    hidden: int
    heads: int
    kv_heads: int
    dim: int
    inner: int
    post: bool
    norm: str
    bias: bool
    dtype: torch.dtype
    batch: int = 37

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.hidden)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

        d, heads, kv, dim = self.hidden, self.heads, self.kv_heads, self.dim
        self.qkv = draw(L, (heads + 2 * kv) * dim, d) * d**-0.5
        self.bias_ = draw(L, (heads + 2 * kv) * dim) if self.bias else None
        self.o, self.down = draw(L, d, heads * dim) * 0.3, draw(L, d, self.inner) * 0.2
        self.gate_up = draw(L, 2 * self.inner, d) * d**-0.5
        self.norms = draw(3, L, d).abs() + 0.5
        widths = {"none": None, "per_head": (dim, dim), "full": (heads * dim, kv * dim)}
        width = widths[self.norm]
        self.qk = None if width is None else tuple(draw(L, w).abs() + 0.5 for w in width)
        self.embedding, self.head = draw(V, d), draw(V, d)
        self.keys, self.values = draw(L, S, M, kv, dim), draw(L, S, M, kv, dim)
        angle = torch.rand(M, dim // 2, generator=generator, dtype=torch.float64) * 6
        self.angle, self.cosines, self.sines = angle, angle.cos(), angle.sin()
        self.cosines, self.sines = self.cosines.to(self.dtype), self.sines.to(self.dtype)
        self.slots = torch.randperm(S, generator=generator)[: self.batch]
        self.positions = torch.randint(M, (self.batch,), generator=generator)
        self.positions[:3] = torch.tensor([0, M - 1, 16])
        self.tokens = torch.randint(V, (self.batch,), generator=generator)

    def step(
        self, rows: Tensor | None = None, table: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Hidden states, logits and the cache after a step of these rows."""
        rows = torch.arange(self.batch) if rows is None else rows
        n, keys, values = len(rows), self.keys.clone(), self.values.clone()
        x, logits = (torch.full((n, w), torch.nan, dtype=self.dtype) for w in (self.hidden, V))
        fused = self.qkv.shape[1]
        scratch = 2 * self.hidden + fused + self.heads * self.dim + self.inner
        slots = self.slots[rows]
        decode_step_(
            x, self.layers(), keys, values, table, slots, self.positions[rows],
            self.cosines, self.sines,
            torch.full((n * scratch,), torch.nan, dtype=self.dtype),
            rows=n, heads=self.heads, intermediate=self.inner, post=self.post, eps=EPS, scale=0.3,
            tokens=self.tokens[rows], embedding=self.embedding,
            head=PackedHead(self.norms[2, 0], packed(self.head)), logits=logits,
        )  # fmt: skip
        return x, logits, keys, values

    def layers(self) -> PackedLayers:
        def all_of(pack: Any, weights: Tensor) -> Tensor:
            return torch.stack([pack(weight) for weight in weights])

        q_norm, k_norm = self.qk or (None, None)
        return PackedLayers(
            all_of(packed, self.qkv), all_of(packed, self.o), all_of(packed_gate_up, self.gate_up),
            all_of(packed, self.down), self.norms[0], self.norms[1], self.bias_, q_norm, k_norm,
        )  # fmt: skip

    def defined(self, row: int) -> tuple[Tensor, Tensor]:
        """Hidden state and logits of a row, from the formulas of the model in fp64."""

        def normed(x: Tensor, weight: Tensor) -> Tensor:
            x = x.double()
            return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()

        heads, kv, dim = self.heads, self.kv_heads, self.dim
        slot, position = int(self.slots[row]), int(self.positions[row])
        turn = torch.polar(torch.ones(dim // 2).double(), self.angle[position])

        def turned(x: Tensor) -> Tensor:
            pairs = torch.complex(*x.chunk(2, -1)) * turn
            return torch.cat((pairs.real, pairs.imag), -1)

        x = self.embedding[self.tokens[row]].double()
        for layer in range(L):
            source = x if self.post else normed(x, self.norms[0, layer])
            fused = self.qkv[layer].double() @ source
            if self.bias_ is not None:
                fused = fused + self.bias_[layer].double()
            q, k, v = fused.split((heads * dim, kv * dim, kv * dim))
            if self.norm == "full":
                q, k = normed(q, self.qk[0][layer]), normed(k, self.qk[1][layer])
            q, k, v = (t.view(-1, dim) for t in (q, k, v))
            if self.norm == "per_head":
                q, k = normed(q, self.qk[0][layer]), normed(k, self.qk[1][layer])
            seen_k = torch.cat((self.keys[layer, slot, :position].double(), turned(k)[None]))
            seen_v = torch.cat((self.values[layer, slot, :position].double(), v[None]))
            every = [t.repeat_interleave(heads // kv, 1) for t in (seen_k, seen_v)]
            shares = (torch.einsum("hd,thd->ht", turned(q), every[0]) * 0.3).softmax(-1)
            attended = self.o[layer].double() @ torch.einsum("ht,thd->hd", shares, every[1]).view(
                -1
            )
            x = x + (normed(attended, self.norms[0, layer]) if self.post else attended)
            source = x if self.post else normed(x, self.norms[1, layer])
            gate, up = (self.gate_up[layer].double() @ source).chunk(2)
            made = self.down[layer].double() @ (gate * gate.sigmoid() * up)
            x = x + (normed(made, self.norms[1, layer]) if self.post else made)
        return x, self.head.double() @ normed(x, self.norms[2, 0])


# widths that are no multiple of a panel or a vector, and ones that are
CASES = [
    Case(64, 2, 2, 32, 160, True, "full", False, torch.float32),
    Case(52, 4, 2, 10, 68, True, "full", False, torch.float32),
    Case(52, 4, 2, 10, 68, False, "per_head", True, torch.float32),
    Case(33, 3, 1, 24, 50, False, "none", True, torch.float32),
    Case(52, 4, 2, 10, 68, True, "none", False, torch.float64),
    Case(40, 4, 1, 12, 24, False, "full", True, torch.float64),
]


def name(case: Case) -> str:
    return f"{case.hidden}-{'post' if case.post else 'pre'}-{case.norm}-{case.dtype}".lower()


@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_step_equals_its_definition(case: Case) -> None:
    x, logits, keys, values = case.step()
    close = {"rtol": 3e-5, "atol": 1e-4} if case.dtype == torch.float32 else {}
    for row in range(case.batch):
        expected, expected_logits = case.defined(row)
        torch.testing.assert_close(x[row].double(), expected, **close)
        torch.testing.assert_close(logits[row].double(), expected_logits, **close)
    written = torch.zeros(S, M, dtype=torch.bool)
    written[case.slots, case.positions] = True
    for table, before in ((keys, case.keys), (values, case.values)):
        assert torch.equal(table[:, ~written], before[:, ~written])
        assert (table != before)[:, written].any(-1).all()


@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_row_has_the_same_bits_among_any_rows_and_threads(case: Case) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        x, logits, *_ = case.step()
        generator = torch.Generator().manual_seed(1)
        for count in (1, 2, 5, 13, 14, 15, 16, 29, case.batch):
            rows = torch.randperm(case.batch, generator=generator)[:count]
            for n in (1, 2, 3):  # with many threads columns are dealt out, with few rows
                torch.set_num_threads(n)
                some, some_logits, *_ = case.step(rows)
                assert torch.equal(some, x[rows]), (count, n)
                assert torch.equal(some_logits, logits[rows]), (count, n)
    finally:
        torch.set_num_threads(threads)


def in_pages(case: Case, size: int, first: Tensor) -> tuple[Case, Tensor, Tensor]:
    """The same caches in pages at random, a table of them, and [S, M] where every token lies. The
    first tokens of all slots are in the pages of one; where nothing lies is no number."""
    count, generator = -(-M // size), torch.Generator().manual_seed(size)
    pages = torch.randperm(S * 2 * count, generator=generator).view(S, 2, count)
    pages[:, 0] = pages[case.slots[0], 0]
    table = torch.cat((first[:, None], pages.flatten(1)), 1).int()
    position = torch.arange(M)
    own = position >= first[:, None]
    inside = torch.where(own, position - first[:, None], position)
    at = pages[torch.arange(S)[:, None], own.long(), inside // size] * size + inside % size
    paged = []
    for cache in (case.keys, case.values):
        shape = (L, S * 2 * count, size, *cache.shape[3:])
        new = torch.full(shape, torch.nan, dtype=case.dtype)
        new.flatten(1, 2)[:, at] = cache
        paged.append(new)
    case = copy(case)
    case.keys, case.values = paged
    angle = torch.nn.functional.pad(case.angle, (0, 0, 0, count * size - M))
    case.cosines, case.sines = angle.cos().to(case.dtype), angle.sin().to(case.dtype)
    return case, table, at


@pytest.mark.parametrize("case", CASES, ids=name)
@pytest.mark.parametrize(("size", "length"), [(16, 21), (5, 15), (16, 16), (1, 3), (64, 7), (7, 0)])
def test_where_its_pages_lie_changes_no_bit_of_a_row(case: Case, size: int, length: int) -> None:
    case = replace(case)  # its cache is written to
    case.positions[0] = 30
    first = torch.zeros(S, dtype=torch.int64)
    first[case.slots] = torch.where(case.positions >= length, length, 0)
    for cache in (case.keys, case.values):
        source = cache[:, case.slots[0]].clone()
        for slot in case.slots.tolist():
            cache[:, slot, : first[slot]] = source[:, : first[slot]]
    x, logits, keys, values = case.step()
    assert (first > 0).sum() > 5 or not length
    paged, table, at = in_pages(case, size, first)
    found_x, found_logits, *caches = paged.step(table=table)
    assert torch.equal(found_x, x)
    assert torch.equal(found_logits, logits)
    for found, before, whole in zip(
        caches, (paged.keys, paged.values), (keys, values), strict=True
    ):
        assert torch.equal(found.flatten(1, 2)[:, at], whole)
        written = at[case.slots, case.positions]
        found.flatten(1, 2)[:, written] = before.flatten(1, 2)[:, written]
        assert torch.equal(found.nan_to_num(7.0), before.nan_to_num(7.0))


def test_panels_hold_every_weight_once_and_zeros() -> None:
    weight = torch.arange(1.0, 71 * 5 + 1).view(71, 5)
    columns = panel_columns(torch.float32)
    panels = packed(weight)
    assert panels.shape == (3, 5, columns)
    assert torch.equal(panels.transpose(1, 2).reshape(-1, 5)[:71], weight)
    assert panels.count_nonzero() == weight.numel()
    both = packed_gate_up(weight[:70])
    assert both.shape == (3, 5, columns)
    gate, up = both.transpose(1, 2).chunk(2, 1)
    assert torch.equal(gate.reshape(-1, 5)[:35], weight[:35])
    assert torch.equal(up.reshape(-1, 5)[:35], weight[35:70])


def arguments() -> tuple[Case, dict[str, Any]]:
    case = Case(52, 4, 2, 10, 68, True, "full", True, torch.float32, batch=3)
    layers = case.layers()
    given: dict[str, Any] = {
        "x": torch.zeros(3, 52), "tokens": case.tokens, "embedding": case.embedding,
        **{f: getattr(layers, f) for f in ("qkv", "qkv_bias", "o", "gate_up", "down")},
        **{f: getattr(layers, f) for f in ("attention_norm", "mlp_norm", "q_norm", "k_norm")},
        "norm": case.norms[2, 0], "head": packed(case.head), "keys": case.keys,
        "values": case.values, "table": None, "slots": case.slots, "positions": case.positions,
        "cosines": case.cosines, "sines": case.sines, "eps": EPS, "scale": 0.3, "heads": 4,
        "intermediate": 68, "post": True, "rows": 3, "scratch": torch.zeros(3 * 292),
        "logits": torch.zeros(3, V),
    }  # fmt: skip
    return case, given


def table_of(slots: int, first: int = 0, own: int = 3) -> Tensor:
    return torch.tensor([[first, 0, own]] * slots, dtype=torch.int32)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("positions", torch.tensor([0, 1, M]), "positions is 48; allowed: 0 to 47"),
        ("slots", torch.tensor([0, -1, 2]), "slots is -1; allowed: 0 to 39"),
        ("table", table_of(40, first=1), "table is 1 shared; allowed: 0 to 0, the position"),
        ("table", table_of(40, first=-1), "table is -1 shared; allowed: 0 to"),
        ("table", table_of(40, own=40), "table is page 40; allowed: 0 to 39"),
        ("table", table_of(40, own=-1), "table is page -1; allowed: 0 to 39"),
        ("table", torch.zeros(40, 4).int(), r"allowed: \[slots, 1 \+ 2 pages of a slot\]"),
        ("table", torch.zeros(40, 3), "table is Float; allowed: Int"),
        ("tokens", torch.tensor([0, 75, 2]), "tokens is 75; allowed: 0 to 74"),
        ("embedding", None, "embedding is missing"),
        ("qkv", torch.zeros(2, 2, 52, 32), r"qkv is of shape \[2, 2, 52, 32\]"),
        ("k_norm", None, "k_norm is missing"),
        ("head", None, "head is missing"),
        ("heads", 3, "heads is 3; allowed: a multiple of 2"),
        ("rows", 4, "rows is 4; allowed: 0 to 3"),
        ("scratch", torch.zeros(3), "scratch is of 3 elements; allowed: 876 or more"),
        ("keys", torch.zeros(2, 40, 48, 2, 10).double(), "keys is Double; allowed: Float"),
    ],
)
def test_wrong_arguments_of_a_step_are_refused_by_name_and_value(
    argument: str, value: object, message: str
) -> None:
    _, given = arguments()
    with pytest.raises(ValueError, match=message):
        torch.ops.megarlx.decode_step_(*{**given, argument: value}.values())


def test_schema_and_fake_kernel_of_a_step_are_right() -> None:
    _, given = arguments()
    torch.library.opcheck(torch.ops.megarlx.decode_step_.default, tuple(given.values()))


def test_packed_layers_name_what_the_op_takes() -> None:
    arguments_of = {a.name for a in torch.ops.megarlx.decode_step_.default._schema.arguments}
    assert {field.name for field in fields(PackedLayers)} <= arguments_of
