"""Causal attention over packed documents in fp32 on a CPU against its formula in fp64.

Letters: T tokens, L tokens of a document, H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from other_processes import INSTRUCTION_SETS, passed_on, printed_with_threads, start_tests
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megarlx.ops.attention import packed_attention

ops = torch.ops.megarlx
SCALE = 0.31
RELATIVE = 2e-6
# one more and one less than tiles, panels and blocks of queries have; documents without a token
LENGTHS = [(1,), (13, 15, 0, 1), (31, 33, 16, 17), (127, 129), (300, 5), (0, 0)]
HEADS = [(2, 2, 32), (4, 1, 20), (6, 2, 33), (3, 3, 1), (2, 1, 80)]  # H, K, D


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def offsets_of(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def heads_of(lengths: Sequence[int], heads: int, kv_heads: int, dim: int) -> list[Tensor]:
    """q, k and v, which is a part of something wider, as it is in a model."""
    tokens = sum(lengths)
    q, k = normal(tokens, heads, dim), normal(tokens, kv_heads, dim, seed=1)
    return [q, k, normal(tokens, kv_heads + 2, dim, seed=2)[:, 2:]]


def formula(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    found = [q[:0]]
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    for a, b, c in zip(*(x.split(tuple(lengths)) for x in (q, k, v)), strict=True):
        scores = SCALE * torch.einsum("thd,uhd->htu", a, b)
        unseen = torch.ones(len(a), len(a), dtype=torch.bool).triu(1)
        weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
        found.append(torch.einsum("htu,uhd->thd", weights, c))
    return torch.cat(found)


def close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found.double() - wanted).norm() <= RELATIVE * wanted.norm().clamp_min(1))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_results_and_gradients_are_the_formulas(
    lengths: tuple[int, ...], shape: tuple[int, int, int]
) -> None:
    inputs = heads_of(lengths, *shape)
    exact = [x.double().requires_grad_() for x in inputs]
    mine = [x.requires_grad_() for x in inputs]
    wanted = formula(*exact, lengths)
    out = packed_attention(*mine, offsets_of(lengths), SCALE)
    upstream = normal(*out.shape, seed=3).mul_(0.5)
    assert close(out, wanted)
    theirs = torch.autograd.grad(wanted, exact, upstream.double())
    for _ in range(2):  # as split schedules do
        ours = torch.autograd.grad(out, mine, upstream, retain_graph=True)
        for a, b in zip(ours, theirs, strict=True):
            assert close(a, b)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    lengths = (40, 70)
    q, k, v = heads_of(lengths, 2, 2, 16)
    q = 200 * q
    out = packed_attention(q, k, v, offsets_of(lengths), SCALE)
    wanted = formula(*(x.double() for x in (q, k, v)), lengths)
    # a score of a thousand is rounded to 6e-5, which its weight multiplies
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=2e-3)


def results(inputs: Sequence[Tensor], upstream: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = packed_attention(*leaves, offsets_of(lengths), SCALE)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("shape", HEADS[:3], ids=str)
def test_a_documents_bits_do_not_depend_on_its_neighbours(shape: tuple[int, int, int]) -> None:
    lengths = (37, 150, 14, 260)
    inputs, begin = heads_of(lengths, *shape), 0
    upstream = normal(sum(lengths), shape[0], shape[2], seed=3)
    together = results(inputs, upstream, lengths)
    for length in lengths:
        place = slice(begin, begin + length)
        alone = results([x[place] for x in inputs], upstream[place], (length,))
        assert all(torch.equal(a[place], b) for a, b in zip(together, alone, strict=True))
        begin += length


def test_a_tokens_bits_do_not_depend_on_what_follows() -> None:
    inputs = heads_of((200,), 2, 1, 32)
    whole = packed_attention(*inputs, offsets_of((200,)), SCALE)
    for length in (1, 13, 14, 15, 33, 129):
        part = packed_attention(*(x[:length] for x in inputs), offsets_of((length,)), SCALE)
        assert torch.equal(part, whole[:length])


THREADS = """
import sys, torch
from megarlx.ops.attention import packed_attention
torch.set_num_threads(int(sys.argv[1]))
draw = torch.Generator().manual_seed(0)
leaves = [torch.randn(700, h, 24, generator=draw).requires_grad_() for h in (4, 2, 2)]
offsets = torch.tensor([0, 10, 310, 311, 600, 600, 700], dtype=torch.int32)
out = packed_attention(*leaves, offsets, 0.2)
out.square().sum().backward()
for x in (out.detach(), *(leaf.grad for leaf in leaves)):
    print(hash(x.numpy().tobytes()))
"""


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    found = printed_with_threads(THREADS)
    assert len(found[0].split()) == 4
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(5, 3, 8)}, r"k's heads is 2; allowed: a divisor of q's 3"),
        ({"k": torch.zeros(4, 2, 8)}, r"k's shape is \[4, 2, 8\]; allowed: \[5, heads, 8\]"),
        ({"v": torch.zeros(5, 1, 8)}, "v's heads is 1; allowed: 2"),
        ({"v": torch.zeros(5, 2, 8).double()}, "v's dtype is Double; allowed: float32"),
        ({"offsets": torch.tensor([0, 5])}, "offsets' dtype is Long; allowed: int32"),
        ({"offsets": torch.tensor([0, 4]).int()}, "offsets is.*allowed: from 0 up to 5"),
        ({"offsets": torch.tensor([0, 6, 5]).int()}, "offsets is.*allowed: from 0 up to 5"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    given = dict(zip("qkv", heads_of((5,), 4, 2, 8), strict=True))
    given = {**given, "offsets": offsets_of((5,)), **change}
    with pytest.raises(ValueError, match=f"(?s)megarlx.packed_attention: {message}"):
        packed_attention(*given.values(), SCALE)


def test_recomputation_leaves_nothing_behind() -> None:
    """A checkpoint stops recomputing by an exception, in the middle of the last op it needs."""
    inputs = [x.requires_grad_() for x in heads_of((9,), 2, 2, 4)]
    made: list[weakref.ref[Tensor]] = []

    def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = 2 * q
        made.append(weakref.ref(q))
        return packed_attention(q, k, v, offsets_of((9,)), SCALE)

    checkpoint(attended, *inputs, use_reentrant=False).sum().backward()
    gc.collect()
    assert [one() for one in made] == [None, None]


def test_backward_has_no_derivative() -> None:
    q, k, v = (x.requires_grad_() for x in heads_of((5,), 2, 2, 4))
    out = packed_attention(q, k, v, offsets_of((5,)), SCALE)
    with pytest.raises(RuntimeError, match="create_graph is True; allowed: False"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def test_opcheck() -> None:
    lengths = (3, 6)
    for requires_grad in (False, True):
        inputs = [x.detach().requires_grad_(requires_grad) for x in heads_of(lengths, 4, 2, 8)]
        torch.library.opcheck(ops.packed_attention, (*inputs, offsets_of(lengths), SCALE))
    inputs = [x.detach() for x in inputs]
    out, lse = ops.packed_attention(*inputs, offsets_of(lengths), SCALE)
    given = (torch.ones_like(out), *inputs, out, lse, offsets_of(lengths), SCALE)
    torch.library.opcheck(ops.packed_attention_backward, given)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_instruction_set_is_right(name: str) -> None:
    assert passed_on(start_tests(name, __file__, "formulas or bits_do or overflow"))
