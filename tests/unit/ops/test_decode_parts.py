"""Parts of a decode step against plain torch: heads into a cache, merged attention, its end.

Letters: B rows, H query heads, K key/value heads, D head_dim, P pages of G places.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from megarlx.ops.decode_parts import (
    NOTHING_DRAWN,
    StepState,
    decode_advance_,
    decode_heads_,
    merge_attention,
)
from megarlx.ops.elementwise import attention_heads_reference

ops = torch.ops.megarlx
EPS = 1e-5
DTYPES = [torch.float32, torch.float64]


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)


def turn(places: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = torch.outer(torch.arange(places).double(), normal(dim // 2, seed=3))
    return angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("kind", ["none", "full", "per_head"])
@pytest.mark.parametrize("shape", [(4, 2, 22), (2, 2, 32), (1, 1, 2)], ids=str)
def test_heads_go_into_q_and_their_places_in_the_cache(
    dtype: torch.dtype, paged: bool, kind: str, shape: tuple[int, int, int]
) -> None:
    h, k, dim = shape
    pages, size, of_slot = 24, 5, 4 if paged else 1
    own = torch.randperm(pages, generator=torch.Generator().manual_seed(1)).int().view(3, 8)
    first = torch.tensor([[7], [0], [3]]).int()  # tokens in the first four pages of a slot
    table = torch.cat((first, own), 1)
    slots = torch.tensor([2, 0, -1, 1])
    positions = torch.tensor([3, size * of_slot - 1, 2, 0])
    sizes = {"none": (), "full": (h * dim, k * dim), "per_head": (dim, dim)}[kind]
    weights = [normal(n, dtype=dtype, seed=5 + i) for i, n in enumerate(sizes)]
    named = dict(zip(("q_weight", "k_weight"), weights, strict=True)) if weights else {}
    qkv = normal(4, (h + 2 * k) * dim, dtype=dtype)
    cosines, sines = turn(size * of_slot, dim, dtype)
    keys, values = (normal(pages, size, k, dim, dtype=dtype, seed=i) for i in (7, 8))
    expected = [keys.clone(), values.clone()]
    q = torch.full((4, h, dim), math.nan, dtype=dtype)
    given = (qkv, keys, values, slots, positions, cosines, sines, q)
    decode_heads_(*given, table=table if paged else None, eps=EPS, **named)
    at = (cosines[positions, None].double(), sines[positions, None].double())
    wide = {name: weight.double() for name, weight in named.items()}
    wanted = attention_heads_reference(qkv.double(), *at, h, k, **wide, eps=EPS)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 0}
    torch.testing.assert_close(q.double(), wanted[0], **close)
    for row in (0, 1, 3):
        page, place = int(slots[row]), int(positions[row])
        if paged:
            inside = place - int(first[page])
            page, place = int(own[page, 4 + inside // size]), inside % size
        for cache, new in zip(expected, wanted[1:], strict=True):
            cache[page, place] = new[row].to(dtype)
    for found, cache in zip((keys, values), expected, strict=True):
        torch.testing.assert_close(found, cache, **close)
        assert int((found != cache).any(-1).sum()) <= 3 * k  # elsewhere not a bit was touched


def test_heads_of_a_norm_over_ranks_take_its_sums() -> None:
    h, k, dim = 4, 2, 6
    qkv, weights = normal(3, (h + 2 * k) * dim), [normal(n * dim, seed=5) for n in (h, k)]
    sums = ops._heads_sums(qkv, h, k)
    places = (torch.arange(3), torch.arange(3), *turn(4, dim, torch.float64))
    found = []
    for given, ranks in ((None, 1), (sums, 1), (2 * sums, 2)):
        keys, q = torch.zeros(3, 4, k, dim).double(), torch.empty(3, h, dim).double()
        decode_heads_(
            *(qkv, keys, keys.clone(), *places, q),
            q_weight=weights[0],
            k_weight=weights[1],
            eps=EPS,
            sums=given,
            ranks=ranks,
        )
        found.append((q, keys))
    for q, keys in found[1:]:
        torch.testing.assert_close(q, found[0][0])
        torch.testing.assert_close(keys, found[0][1])


def attention(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Of q [B, H, D] over [M, H, D], and the log-sum-exp of its scores."""
    scores = torch.einsum("bhd,mhd->bhm", q, keys)
    return torch.einsum("bhm,mhd->bhd", scores.softmax(-1), values), scores.logsumexp(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [3, 8, 64])
def test_parts_are_merged_into_attention_over_both(dtype: torch.dtype, dim: int) -> None:
    q, keys, values = normal(5, 2, dim), normal(9, 2, dim, seed=1), normal(9, 2, dim, seed=2)
    parts = [attention(q, keys[part], values[part]) for part in (slice(0, 4), slice(4, 9))]
    found = merge_attention(*(x.to(dtype).contiguous() for part in parts for x in part))
    for a, b in zip(found, attention(q, keys, values), strict=True):
        torch.testing.assert_close(a, b.to(dtype))


def test_a_part_that_holds_nothing_counts_for_nothing() -> None:
    out, lse = normal(2, 3, 8), normal(2, 3)
    for sign in (-1, 1):  # flash-attn leaves either
        nothing = (torch.full_like(out, math.nan), torch.full_like(lse, sign * math.inf))
        for given in ((out, lse, *nothing), (*nothing, out, lse)):
            assert all(
                torch.equal(a, b) for a, b in zip(merge_attention(*given), (out, lse), strict=True)
            )
        merged, of_none = merge_attention(*nothing, *nothing)
        assert not merged.any()
        assert bool((of_none == -math.inf).all())


def test_a_row_is_merged_alone() -> None:
    given = [normal(7, 2, 8), normal(7, 2), normal(7, 2, 8, seed=1), normal(7, 2, seed=1)]
    whole = merge_attention(*given)
    packed = [given[0], given[1].t().contiguous().t(), *given[2:]]  # heads first, in memory
    assert all(torch.equal(a, b) for a, b in zip(merge_attention(*packed), whole, strict=True))
    for row in range(7):
        alone = merge_attention(*(x[row : row + 1].contiguous() for x in given))
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, whole, strict=True))


class PlainRow:
    """What decode_advance_ does to a row, in Python."""

    def __init__(self, sequence: int, position: int, last: int, slot: int) -> None:
        self.token, self.place, self.slot = 0, position - 1, slot
        self.key, self.last, self.frozen = [sequence, position], last, False
        self.seen: list[int] = []

    def advance(self, token: int, ends: list[int], idle: int) -> None:
        self.seen.append(NOTHING_DRAWN if self.frozen else token)
        if self.frozen:
            return
        self.frozen = token < 0 or token in ends or self.key[1] >= self.last
        self.token, self.place = (0, 0) if self.frozen else (token, self.key[1])
        self.slot = idle if self.frozen else self.slot
        self.key[1] += 1


@pytest.mark.parametrize("rows", [1, 3, 300])
@pytest.mark.parametrize("ends", [[], [4], [4, 7]])
def test_rows_go_on_until_their_last_token_and_stay_frozen(rows: int, ends: list[int]) -> None:
    rng, ring, idle = torch.Generator().manual_seed(rows), 3, 99
    plain = [PlainRow(10 + i, 1 + i % 4, 3 + i % 5, i) for i in range(rows)]
    state = StepState.empty(rows, ring, "cpu")
    for i, row in enumerate(plain):
        state.positions[i], state.slots[i], state.frozen[i] = row.place, row.slot, False
        state.keys[i], state.last_positions[i] = torch.tensor(row.key), row.last
    for step in range(7):
        drawn = torch.randint(-1, 9, (rows,), generator=rng)
        logprob, sampled = (torch.randn(rows, generator=rng) for _ in range(2))
        before = state.frozen.clone()
        end_tokens = torch.tensor(ends, dtype=torch.int64)
        decode_advance_(state, drawn, logprob, sampled, ends=end_tokens, idle_slot=idle)
        for row, token in zip(plain, drawn.tolist(), strict=True):
            row.advance(token, ends, idle)
        assert state.step.item() == step + 1
        assert state.history[step % ring].tolist() == [row.seen[-1] for row in plain]
        assert state.tokens.tolist() == [row.token for row in plain]
        assert state.positions.tolist() == [row.place for row in plain]
        assert state.slots.tolist() == [row.slot for row in plain]
        assert state.keys.tolist() == [row.key for row in plain]
        assert state.frozen.tolist() == [row.frozen for row in plain]
        for found, given in zip(state.logprobs[:, step % ring], (logprob, sampled), strict=True):
            assert torch.equal(found, given.masked_fill(before, 0))
    assert state.frozen.all()


def heads_arguments() -> list:
    cosines, sines = turn(8, 4, torch.float32)
    cache = torch.zeros(2, 4, 1, 4)
    table = torch.tensor([[0, 0, 0, 0, 1]], dtype=torch.int32)
    slots, positions = torch.zeros(3, dtype=torch.int64), torch.arange(3)
    qkv, weight = normal(3, 16, dtype=torch.float32), torch.ones(4)
    given = [qkv, cache, cache.clone(), table, slots, positions, cosines, sines]
    return [*given, weight, weight, None, 1, EPS, torch.empty(3, 2, 4)]


def test_opcheck() -> None:
    check = torch.library.opcheck
    check(ops.decode_heads_, tuple(heads_arguments()))
    out, lse = normal(2, 3, 8), normal(2, 3)
    check(ops.merge_attention, (out, lse, out, lse))
    state = StepState.empty(2, 3, "cpu")
    whole = torch.arange(2)
    check(
        ops.decode_advance_,
        (
            *(whole, torch.ones(2), torch.ones(2), whole, state.last_positions, 5),
            *(state.tokens, state.positions, state.slots, state.keys),
            *(state.frozen, state.step, state.history, state.logprobs),
        ),
    )


VALUE = pytest.mark.not_emulated("CUDA does not look at values: what does not exist is left alone")
BAD = [
    pytest.param(0, torch.ones(3, 15), r"qkv is of shape \[3, 15\]; allowed: \[3, 16\]"),
    pytest.param(1, torch.ones(2, 4, 4), r"keys is of shape \[2, 4, 4\]; allowed: \[pages"),
    pytest.param(2, torch.ones(2, 4, 1, 2), "values is of shape"),
    pytest.param(3, torch.ones(2, 3), "table is Float; allowed: Int"),
    pytest.param(3, torch.ones(2, 4).int(), "table is of shape .2, 4.; allowed: .slots, 1"),
    pytest.param(4, torch.full((3,), 1), "slots is 1; allowed: below 1", marks=VALUE),
    pytest.param(5, torch.full((3,), 8), "positions is 8; allowed: 0 to 7", marks=VALUE),
    pytest.param(6, torch.ones(7, 2), r"cosines is of shape \[7, 2\]; allowed: \[8 or more, 2\]"),
    pytest.param(9, None, "k_weight is missing; allowed: both"),
    pytest.param(10, torch.ones(3, 2), "sums is given; allowed: none where no norm spans"),
    pytest.param(11, 0, "ranks is 0; allowed: an integer > 0"),
]


@pytest.mark.parametrize(("place", "value", "message"), BAD)
def test_bad_inputs_are_named_with_what_is_allowed(place: int, value: object, message: str) -> None:
    arguments = heads_arguments()
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        ops.decode_heads_(*arguments)


def test_every_part_takes_no_rows() -> None:
    arguments = heads_arguments()
    for place in (0, 4, 5, 13):
        arguments[place] = arguments[place][:0]
    ops.decode_heads_(*arguments)
    out, lse = merge_attention(*(torch.ones(0, 2, 4), torch.ones(0, 2)) * 2)
    assert (out.shape, lse.shape) == ((0, 2, 4), (0, 2))
    assert list(itertools.chain(out.flatten(), lse.flatten())) == []
