"""Fused sampling. B rows, V vocabulary ids."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from megarlx.ops import sample, sample_reference
from megarlx.ops.sample import Sample

SIZES = [1, 7, 97, 127, 128, 129, 330, 2047, 5003]
DTYPES = [torch.float32, torch.bfloat16]
FILTERS: list[dict] = [
    {},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.02},
    {"top_k": 40, "top_p": 0.7, "min_p": 0.05, "temperature": 1.3},
]


# What many draws show of the CPU holds for CUDA: test_sample_cuda.py finds its tokens equal.
MANY_DRAWS = pytest.mark.not_emulated("tens of thousands of rows take minutes on fibers")


def keys_of(rows: int, position: int = 0) -> Tensor:
    return torch.stack([torch.arange(rows), torch.full((rows,), position)], 1)


def random_logits(rows: int, size: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * spread


def same(a: Sample, b: Sample) -> bool:
    return all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(a, b, strict=True))


def draw_many(row: Tensor, count: int, seed: int = 0, **options: object) -> Sample:
    """`count` draws from one row: the row repeated without copies, one position for each draw."""
    keys = torch.stack([torch.zeros(count, dtype=torch.long), torch.arange(count)], 1)
    return sample(row.expand(count, -1), seed=seed, keys=keys, **options)


# The noise


def philox_in_numpy(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    c, k = counter.astype(np.uint64).copy(), key.astype(np.uint64).copy()
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = c[:, 0] * np.uint64(0xD2511F53), c[:, 2] * np.uint64(0xCD9E8D57)
        c = np.stack(
            [(b >> np.uint64(32)) ^ c[:, 1] ^ k[..., 0], b & low,
             (a >> np.uint64(32)) ^ c[:, 3] ^ k[..., 1], a & low], 1
        )  # fmt: skip
        k = (k + np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)) & low
    return c


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter: tuple, key: tuple, expected: tuple) -> None:
    got = torch.ops.megarlx.philox(torch.tensor([counter]), torch.tensor(key))
    assert tuple(got[0].tolist()) == expected
    assert tuple(philox_in_numpy(np.array([counter]), np.array(key))[0].tolist()) == expected


def test_gumbel_equals_fp64_over_both_tails() -> None:
    near_zero = [0, 1, 2, 1000, 2**20, 2**40, 2**62, 2**63 - 1]
    patterns = near_zero + [-1 - b for b in near_zero]  # the complement: u near 1
    patterns += torch.randint(-(2**63), 2**63 - 1, (5000,)).tolist()
    got = torch.ops.megarlx.gumbel(torch.tensor(patterns)).numpy()
    unsigned = [b % 2**64 for b in patterns]
    # -log(u): from u itself, or from 1 - u where u is near 1.
    exponential = [
        -math.log1p(-(2**63 - (b >> 1) - 0.5) / 2**63)
        if b >= 2**63
        else -math.log(((b >> 1) + 0.5) / 2**63)
        for b in unsigned
    ]
    np.testing.assert_allclose(got, -np.log(exponential), rtol=3e-7, atol=1e-6)
    assert got.max() > 44.0  # not cut off at 15.9 (24 bits) or 22.2 (32 bits)


def test_gumbel_tails_hold_their_share_of_the_philox_bits() -> None:
    count = 1 << 21
    counters = torch.zeros(count // 2, 4, dtype=torch.long)
    counters[:, 0] = torch.arange(count // 2)
    words = torch.ops.megarlx.philox(counters, torch.tensor([5, 6]))
    bits = (words[:, [0, 2]] + words[:, [1, 3]] * 2**32).flatten()
    g = torch.ops.megarlx.gumbel(bits)
    for level in (-2.5, -2.0, 0.0, 5.0, 8.0, 10.0):
        above = -math.expm1(-math.exp(-level))
        share = above if level > 0 else 1 - above
        found = (g > level).sum().item() if level > 0 else (g <= level).sum().item()
        assert abs(found - share * count) < 5 * math.sqrt(share * count) + 1, level


def tokens_in_fp64(logits: Tensor, keys: Tensor, seed: int, temperature: float) -> np.ndarray:
    """The draw as documented, with the noise of numpy's Philox and everything else in fp64."""
    x = logits.double().numpy() / temperature
    rows, size = x.shape
    tiles = -(-size // 128)
    x = np.pad(x, ((0, 0), (0, tiles * 128 - size)), constant_values=-np.inf)
    x = x.reshape(rows, tiles, 128)
    largest = x.max(-1)
    mass = np.exp(x - largest[..., None])
    split = np.uint64(0xFFFFFFFF)
    k = keys.numpy().astype(np.uint64)
    words = np.stack([k[:, 0] & split, k[:, 0] >> np.uint64(32),
                      k[:, 1] & split, k[:, 1] >> np.uint64(32)], 1)  # fmt: skip
    row_keys = philox_in_numpy(words, np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]))
    tokens = []
    for row in range(rows):
        r = row_keys[row]
        counters = np.array([[t, 0, r[2], r[3]] for t in range(tiles)], dtype=np.uint64)
        noise = philox_in_numpy(counters, r[:2])
        u, v = (
            [(int(a) + (int(b) << 32) + 0.5) / 2**64 for a, b in noise[:, pair]]
            for pair in ([0, 1], [2, 3])
        )
        scores = largest[row] + np.log(mass[row].sum(-1)) - np.log(-np.log(u))
        tile = int(scores.argmax())
        cumulative = np.cumsum(mass[row, tile])
        inside = int(np.searchsorted(cumulative, v[tile] * cumulative[-1], side="right"))
        tokens.append(tile * 128 + inside)
    return np.array(tokens)


@pytest.mark.parametrize("size", [7, 127, 330, 5003])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_equal_the_same_draw_written_in_fp64(size: int, temperature: float) -> None:
    logits, keys = random_logits(200, size), keys_of(200, position=2**40 + 3)
    keys[:, 0] += 2**33
    seed = -(2**50) + 12345
    got = sample(logits, seed=seed, keys=keys, temperature=temperature).token.numpy()
    assert (got != tokens_in_fp64(logits, keys, seed, temperature)).sum() == 0


# The distribution


def g_statistic(counts: np.ndarray, p: np.ndarray) -> tuple[float, int]:
    """Of categories with at least 10 expected draws; the rest is pooled into one."""
    n = counts.sum()
    order = np.argsort(-p)
    counts, p = counts[order], p[order]
    cut = int((p * n >= 10).sum())
    if cut < len(p):
        counts = np.append(counts[:cut], counts[cut:].sum())
        p = np.append(p[:cut], p[cut:].sum())
    seen = counts > 0
    return 2 * float((counts[seen] * np.log(counts[seen] / (n * p[seen]))).sum()), len(p) - 1


def z_of_g(g: float, freedom: int) -> float:
    """Wilson and Hilferty's normal form of a chi-squared variable."""
    t = 2 / (9 * freedom)
    return ((g / freedom) ** (1 / 3) - (1 - t)) / math.sqrt(t)


@MANY_DRAWS
@pytest.mark.parametrize(
    ("size", "draws"), [(7, 400_000), (127, 400_000), (50257, 10_000), (151936, 4_000)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_follow_fp64_softmax(size: int, draws: int, dtype: torch.dtype) -> None:
    row = random_logits(1, size, seed=size, spread=2.0)[0].to(dtype)
    p = torch.softmax(row.double() / 0.8, -1).numpy()
    tokens = draw_many(row, draws, temperature=0.8).token.numpy()
    z = z_of_g(*g_statistic(np.bincount(tokens, minlength=size).astype(float), p))
    assert abs(z) < 5, z


@MANY_DRAWS
@pytest.mark.parametrize(("size", "draws"), [(7, 2_000_000), (151936, 4_000)])
def test_tail_tokens_of_one_in_a_million_hold_their_share(size: int, draws: int) -> None:
    # Few heads hold what the tail does not; every other id has p = 1e-6.
    tail_ids = np.ones(size, dtype=bool)
    heads = np.array([0, 3, 5]) if size == 7 else np.array([1, 200, 99_999])
    tail_ids[heads] = False
    p = np.full(size, 1e-6)
    p[heads] = (1 - p[tail_ids].sum()) * np.array([0.5, 0.3, 0.2])
    tokens = draw_many(torch.tensor(np.log(p), dtype=torch.float32), draws, seed=3).token.numpy()
    share = p[tail_ids].sum()
    found = tail_ids[tokens].sum()
    assert abs(found - draws * share) < 5 * math.sqrt(draws * share * (1 - share)) + 1
    # and spread evenly over the ids: the two halves of the tail are alike
    middle = np.median(np.flatnonzero(tail_ids))
    low = (tail_ids[tokens] & (tokens < middle)).sum()
    assert abs(2 * low - found) < 5 * math.sqrt(found + 1) + 2


@MANY_DRAWS
def test_a_rare_id_beside_a_certain_one_is_drawn_at_its_rate() -> None:
    # In one tile, and in different tiles: p = 2e-5 in 2 million draws.
    for size, rare in ((7, 3), (300, 290)):
        row = torch.full((size,), -math.inf)
        row[0], row[rare] = 0.0, math.log(2e-5)
        found = (draw_many(row, 2_000_000, seed=size).token == rare).sum().item()
        assert abs(found - 40) < 5 * math.sqrt(40)


@MANY_DRAWS
@pytest.mark.parametrize("options", FILTERS)
def test_reference_and_op_draw_from_the_same_distribution(options: dict) -> None:
    row, draws = random_logits(1, 330, seed=4, spread=2.0)[0], 100_000
    mine = torch.bincount(draw_many(row, draws, **options).token, minlength=330)
    uniforms = torch.rand(draws, generator=torch.Generator().manual_seed(1)).double()
    other = torch.stack(
        [
            torch.bincount(
                sample_reference(row.expand(2000, -1), u, **options).token, minlength=330
            )
            for u in uniforms.split(2000)
        ]
    ).sum(0)
    assert torch.equal(mine[other > 400] > 0, other[other > 400] > 0)
    both = (mine + other).double()
    enough = both >= 20
    chi = ((mine - other).double() ** 2 / both)[enough].sum().item()
    if enough.sum() > 1:
        assert abs(z_of_g(chi, int(enough.sum()) - 1)) < 5


# Log-probs


@pytest.mark.parametrize("size", [*SIZES, 50257])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
def test_both_logprobs_equal_fp64(size: int, dtype: torch.dtype, temperature: float) -> None:
    logits = (random_logits(33, size, spread=4.0) + 20.0).to(dtype)
    got = sample(logits, seed=9, keys=keys_of(33), temperature=temperature)
    at = got.token[:, None]
    model = torch.log_softmax(logits.double(), -1).gather(1, at)[:, 0]
    sampled = torch.log_softmax(logits.double() / temperature, -1).gather(1, at)[:, 0]
    assert (got.logprob - model).abs().max() < 2e-6
    assert (got.sampled_logprob - sampled).abs().max() < 2e-6


@pytest.mark.parametrize("options", FILTERS[1:])
@pytest.mark.parametrize("size", [97, 5003])
def test_filtered_logprob_is_that_of_the_kept_set(options: dict, size: int) -> None:
    logits = random_logits(40, size)
    got = sample(logits, seed=1, keys=keys_of(40), **options)
    kept = kept_in_fp64(logits, **options)
    scaled = logits.double() / options.get("temperature", 1.0)
    sampled = torch.log_softmax(scaled.masked_fill(~kept, -math.inf), -1)
    model = torch.log_softmax(logits.double(), -1)
    at = got.token[:, None]
    assert (got.sampled_logprob - sampled.gather(1, at)[:, 0]).abs().max() < 2e-6
    assert (got.logprob - model.gather(1, at)[:, 0]).abs().max() < 2e-6


def test_logprob_of_huge_logits_stays_exact() -> None:
    row = torch.tensor([[1e6, 1e6 - 1.0, -3e38, -math.inf]])
    got = sample(row, seed=0, keys=keys_of(1))
    expected = torch.log_softmax(row.double(), -1)[0, got.token[0]]
    assert abs(got.logprob.item() - expected.item()) < 1e-6


# Filters


def kept_in_fp64(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """The kept ids by a full sort in fp64; ids equal to the last one kept are kept too."""
    kept = []
    for row in (logits.double() / temperature).numpy():
        order = np.argsort(-row, kind="stable")
        values = row[order]
        least = -np.inf
        if 0 < top_k < len(row):
            least = values[top_k - 1]
        if top_p < 1:
            left = values[values >= least]
            p = np.exp(left - left[0])
            reached = np.cumsum(p) >= top_p * p.sum() * (1 - 1e-12)
            least = max(least, left[int(reached.argmax())])
        if min_p > 0:
            least = max(least, values[0] + math.log(min_p))
        kept.append(row >= least)
    return torch.tensor(np.array(kept))


def seen_ids(row: Tensor, **options: object) -> set[int]:
    return set(draw_many(row, 30_000, **options).token.tolist())


@MANY_DRAWS
@pytest.mark.parametrize("size", [7, 97, 330])
@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1}, {"top_k": 3}, {"top_k": 6}, {"top_p": 0.5}, {"top_p": 0.9}, {"min_p": 0.3},
        {"top_k": 6, "top_p": 0.6}, {"top_k": 20, "min_p": 0.2, "temperature": 0.7},
        {"top_p": 0.7, "min_p": 0.1, "temperature": 2.0},
    ],
)  # fmt: skip
def test_kept_set_equals_an_fp64_sort(size: int, options: dict) -> None:
    # A spread at which every kept id is seen in 30,000 draws.
    row = random_logits(1, size, seed=size, spread=0.7)[0]
    expected = set(kept_in_fp64(row[None], **options)[0].nonzero()[:, 0].tolist())
    assert seen_ids(row, **options) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{"top_k": 3000}, {"top_p": 0.9}, {"top_p": 0.999}, {"top_k": 50, "top_p": 0.5}]
)
def test_kept_mass_of_a_large_vocabulary_equals_an_fp64_sort(
    dtype: torch.dtype, options: dict
) -> None:
    # The log-prob under the kept set tells its mass: one id more or less shows.
    logits = random_logits(6, 50257, spread=2.5).to(dtype)
    got = sample(logits, seed=2, keys=keys_of(6), **options)
    sampled = logits.double().masked_fill(~kept_in_fp64(logits, **options), -math.inf)
    expected = torch.log_softmax(sampled, -1).gather(1, got.token[:, None])[:, 0]
    assert (got.sampled_logprob - expected).abs().max() < 3e-6


@MANY_DRAWS
def test_equal_logits_at_the_threshold_are_all_kept() -> None:
    row = torch.full((300,), -4.0)
    row[[3, 140, 299]] = 2.0
    row[[7, 130, 256, 290]] = 1.0
    assert seen_ids(row, top_k=2) == {3, 140, 299}
    assert seen_ids(row, top_k=4) == {3, 140, 299, 7, 130, 256, 290}
    assert seen_ids(row, top_p=0.3) == {3, 140, 299}
    assert seen_ids(row, min_p=math.exp(-1.0) * 0.999) == {3, 140, 299, 7, 130, 256, 290}
    assert seen_ids(row, min_p=1.0) == {3, 140, 299}
    signed = torch.tensor([0.0, -0.0, -1.0])
    assert seen_ids(signed, top_k=1) == {0, 1}


@MANY_DRAWS
def test_top_p_is_taken_of_what_top_k_left() -> None:
    row = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # Alone, 0.6 needs two ids; of the two that top-k leaves (4/7, 3/7), 0.56 needs only one.
    assert seen_ids(row, top_p=0.6) == {0, 1}
    assert seen_ids(row, top_k=2, top_p=0.56) == {0}


@pytest.mark.parametrize("size", [1, 7, 330])
def test_filters_at_their_ends(size: int) -> None:
    logits, keys = random_logits(50, size), keys_of(50)
    plain = sample(logits, seed=1, keys=keys)
    best = logits.argmax(-1)
    ones = torch.ones(50)
    assert torch.equal(sample(logits, seed=1, keys=keys, top_p=0.0).token, best)
    assert torch.equal(sample(logits, seed=1, keys=keys, top_k=1).token, best)
    assert torch.equal(sample(logits, seed=1, keys=keys, min_p=1.0).token, best)
    for off in (
        {"top_k": size}, {"top_k": size + 5}, {"top_k": 2**62}, {"top_p": ones},
        {"min_p": ones * 0}, {"top_k": torch.zeros(50, dtype=torch.long)},
    ):  # fmt: skip
        assert same(sample(logits, seed=1, keys=keys, **off), plain), off


def test_options_may_differ_by_row() -> None:
    logits, keys = random_logits(12, 330), keys_of(12)
    heat = torch.tensor([0.0, 0.5, 1.0, 2.0] * 3)
    k = torch.tensor([0, 3, 50] * 4)
    p = torch.tensor([1.0, 0.5] * 6)
    m = torch.tensor([0.0, 0.0, 0.0, 0.1] * 3)
    together = sample(logits, seed=1, keys=keys, temperature=heat, top_k=k, top_p=p, min_p=m)
    for i in range(12):
        alone = sample(
            logits[i : i + 1], seed=1, keys=keys[i : i + 1], temperature=heat[i].item(),
            top_k=int(k[i]), top_p=p[i].item(), min_p=m[i].item(),
        )  # fmt: skip
        assert same(alone, Sample(*(t[i : i + 1] for t in together)))


def test_temperature_zero_takes_the_lowest_of_the_largest() -> None:
    logits = random_logits(5, 700)
    logits[:, [129, 130, 400]] = 50.0
    for options in ({}, {"top_k": 2}, {"top_p": 0.1}):
        got = sample(logits, seed=1, keys=keys_of(5), temperature=0.0, **options)
        assert got.token.tolist() == [129] * 5
        assert got.sampled_logprob.tolist() == [0.0] * 5
        assert torch.allclose(got.logprob, torch.full((5,), -math.log(3.0)), atol=1e-6)


# The same token, however the work is cut


@pytest.mark.parametrize("options", FILTERS)
@pytest.mark.parametrize("size", [97, 5003])
def test_same_key_gives_same_token_under_any_row_order(options: dict, size: int) -> None:
    logits, keys = random_logits(64, size), keys_of(64, position=5)
    order = torch.randperm(64)
    whole = sample(logits, seed=7, keys=keys, **options)
    moved = sample(logits[order], seed=7, keys=keys[order], **options)
    assert same(Sample(*(t[order] for t in whole)), moved)


@pytest.mark.parametrize("options", FILTERS)
def test_same_key_gives_same_token_in_any_batch_and_stride(options: dict) -> None:
    logits, keys = random_logits(64, 333), keys_of(64)
    whole = sample(logits, seed=7, keys=keys, **options)
    for rows in (1, 3, 16):
        part = sample(logits[:rows], seed=7, keys=keys[:rows], **options)
        assert same(Sample(*(t[:rows] for t in whole)), part)
    wide = torch.full((64, 401), math.nan)
    wide[:, 3:336] = logits  # rows that start off any vector's alignment
    assert same(sample(wide[:, 3:336], seed=7, keys=keys, **options), whole)


def test_threads_change_nothing() -> None:
    logits, keys = random_logits(40, 5003), keys_of(40)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(sample(logits, seed=7, keys=keys, temperature=0.9))
    finally:
        torch.set_num_threads(before)
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def in_shards(logits: Tensor, shards: int, keys: Tensor, heat: Tensor, real: int) -> Sample:
    width = logits.shape[1] // shards
    partials = [
        torch.ops.megarlx.sample_partials(
            logits[:, i * width : (i + 1) * width], torch.tensor([3]), keys, heat, i * width, real
        )
        for i in range(shards)
    ]
    return Sample(*torch.ops.megarlx.sample_combine(torch.stack(partials), heat))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("spread", [0.5, 3.0, 40.0])
@pytest.mark.parametrize("real", [2048, 1500, 300])
def test_any_split_of_the_vocabulary_gives_the_same_bits(
    dtype: torch.dtype, temperature: float, spread: float, real: int
) -> None:
    logits, keys = random_logits(64, 2048, spread=spread).to(dtype), keys_of(64)
    logits[5, :100] = math.nan
    logits[6] = -math.inf
    logits[7, 512:] = -math.inf
    logits[8, :1024] = -math.inf
    heat = torch.tensor([temperature])
    whole = sample(logits, seed=3, keys=keys, temperature=temperature, vocab_size=real)
    for shards in (1, 2, 4, 8, 16):
        assert same(in_shards(logits, shards, keys, heat, real), whole), shards


# Rows that are not a distribution, and padding


@pytest.mark.parametrize("size", [7, 128, 330, 3000])
@pytest.mark.parametrize("options", [*FILTERS, {"temperature": 0.0}])
def test_broken_rows_are_flagged_and_their_neighbours_are_not(size: int, options: dict) -> None:
    logits, keys = random_logits(9, size), keys_of(9)
    clean = sample(logits, seed=1, keys=keys, **options)
    last = size - 1
    logits[1, last] = math.nan
    logits[2, 0] = -math.nan
    logits[3] = -math.inf
    logits[4, size // 2] = math.inf
    logits[5] = math.inf
    logits[6] = math.nan
    got = sample(logits, seed=1, keys=keys, **options)
    bad = torch.zeros(9, dtype=torch.bool)
    bad[1:7] = True
    assert got.token[bad].tolist() == [-1] * 6
    assert got.logprob[bad].isnan().all()
    assert got.sampled_logprob[bad].isnan().all()
    assert same(Sample(*(t[~bad] for t in got)), Sample(*(t[~bad] for t in clean)))


@pytest.mark.parametrize("options", [*FILTERS, {"temperature": 0.0}])
@pytest.mark.parametrize("value", [0.0, -1e4, 3e38, -3e38, 1e-40])
def test_one_finite_logit_is_always_drawn(options: dict, value: float) -> None:
    for size, at in ((1, 0), (97, 96), (700, 500)):
        row = torch.full((1, size), -math.inf)
        row[0, at] = value
        got = sample(row.expand(20, -1), seed=1, keys=keys_of(20), **options)
        assert got.token.tolist() == [at] * 20
        assert got.logprob.abs().max() < 1e-6
        assert got.sampled_logprob.abs().max() < 1e-6


@MANY_DRAWS
@pytest.mark.parametrize("value", [1e30, -1e30, torch.finfo(torch.float32).min])
def test_equal_huge_logits_are_drawn_evenly(value: float) -> None:
    tokens = draw_many(torch.full((512,), value), 20_000).token
    counts = torch.bincount(tokens // 128, minlength=4)
    assert (counts - 5000).abs().max() < 5 * math.sqrt(5000)


@pytest.mark.parametrize("options", FILTERS)
def test_padding_ids_are_never_drawn_nor_read(options: dict) -> None:
    logits, keys = random_logits(200, 300), keys_of(200)
    for padding in (100.0, math.nan, math.inf):
        padded = torch.full((200, 512), padding)
        padded[:, :300] = logits
        got = sample(padded, seed=1, keys=keys, vocab_size=300, **options)
        assert same(got, sample(logits, seed=1, keys=keys, **options))
        assert got.token.max() < 300


@MANY_DRAWS
def test_tiny_and_huge_temperatures_are_their_limits() -> None:
    logits, keys = random_logits(50, 330), keys_of(50)
    cold = sample(logits, seed=1, keys=keys, temperature=1e-30)
    assert torch.equal(cold.token, logits.argmax(-1))
    row = torch.tensor([5.0, -5.0, -math.inf, 0.0])
    counts = torch.bincount(draw_many(row, 30_000, temperature=1e38).token, minlength=4)
    assert counts[2] == 0
    assert (counts[[0, 1, 3]] - 10_000).abs().max() < 500


def test_empty_batch_gives_empty_results() -> None:
    for options in FILTERS:
        got = sample(torch.zeros(0, 50), seed=1, keys=torch.zeros(0, 2).long(), **options)
        assert [t.shape for t in got] == [(0,)] * 3


# The op as torch sees it


@pytest.mark.parametrize("options", [(None, None, None), (5, 0.9, 0.01)])
def test_opcheck(options: tuple) -> None:
    k, p, m = options
    seed, heat = torch.tensor([1]), torch.tensor([0.8])
    logits, keys = random_logits(6, 256), keys_of(6)
    filters = (
        None if k is None else torch.tensor([k]),
        None if p is None else torch.tensor([p]),
        None if m is None else torch.tensor([m]),
    )
    ops = torch.ops.megarlx
    torch.library.opcheck(ops.sample.default, (logits, seed, keys, heat, *filters, 256))
    torch.library.opcheck(ops.sample_partials.default, (logits, seed, keys, heat, 128, 300))
    partials = ops.sample_partials(logits, seed, keys, heat, 0, 256)[None]
    torch.library.opcheck(ops.sample_combine.default, (partials, heat))
    torch.library.opcheck(ops.philox.default, (torch.zeros(3, 4).long(), torch.tensor([1, 2])))
    torch.library.opcheck(ops.gumbel.default, (torch.arange(5),))


def test_sampling_has_no_gradient() -> None:
    logits = random_logits(3, 50).requires_grad_()
    got = sample(logits, seed=1, keys=keys_of(3))
    assert not got.logprob.requires_grad


# Bad input

# A GPU would have to be waited for to see these; there such a row's token is -1.
VALUE = pytest.mark.not_emulated("CUDA does not look at values: they make token -1")
GOOD: dict = {"seed": 1, "temperature": 1.0}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"logits": torch.zeros(4)}, "logits"),
        ({"logits": torch.zeros(4, 5, 6)}, "logits"),
        ({"logits": torch.zeros(4, 9, dtype=torch.float64)}, "logits"),
        ({"logits": torch.zeros(4, 9, dtype=torch.int64)}, "logits"),
        ({"logits": torch.zeros(4, 0)}, "logits"),
        ({"logits": torch.zeros(9, 4).T}, "logits"),
        ({"logits": [[0.0]]}, "logits"),
        ({"keys": torch.zeros(4, 2)}, "keys"),
        ({"keys": torch.zeros(3, 2).long()}, "keys"),
        ({"keys": torch.zeros(4, 3).long()}, "keys"),
        ({"keys": torch.zeros(4).long()}, "keys"),
        ({"keys": torch.zeros(2, 4).long().T}, "keys"),
        ({"keys": None}, "keys"),
        ({"seed": 0.5}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": torch.zeros(2).long()}, "seed"),
        ({"seed": torch.zeros(1)}, "seed"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        pytest.param(
            {"temperature": torch.tensor([1.0, -0.5, 1.0, 1.0])}, "temperature", marks=VALUE
        ),
        ({"temperature": torch.ones(3)}, "temperature"),
        ({"temperature": torch.ones(4, 1)}, "temperature"),
        ({"temperature": torch.ones(4).long()}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        pytest.param({"top_k": torch.full((4,), -2)}, "top_k", marks=VALUE),
        ({"top_k": torch.ones(4)}, "top_k"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": True}, "top_p"),
        pytest.param({"top_p": torch.full((4,), 1.5)}, "top_p", marks=VALUE),
        pytest.param({"top_p": torch.full((4,), math.nan)}, "top_p", marks=VALUE),
        ({"min_p": 2}, "min_p"),
        pytest.param({"min_p": torch.full((1,), -1.0)}, "min_p", marks=VALUE),
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": 10}, "vocab_size"),
        ({"vocab_size": 2.0}, "vocab_size"),
    ],
)
def test_bad_argument_is_named_with_what_is_allowed(change: dict, name: str) -> None:
    arguments = {"logits": torch.zeros(4, 9), "keys": keys_of(4), **GOOD, **change}
    logits = arguments.pop("logits")
    with pytest.raises((ValueError, TypeError), match=rf"megarlx\.sample: .*{name}.*; allowed: "):
        sample(logits, **arguments)


def test_bad_partials_are_refused() -> None:
    ops, heat = torch.ops.megarlx, torch.ones(1)
    for partials in (
        torch.zeros(2, 13).long(), torch.zeros(1, 2, 12).long(), torch.zeros(1, 2, 13),
        torch.zeros(0, 2, 13).long(), torch.zeros(13, 2, 1).long().permute(2, 1, 0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"megarlx\.sample_combine: .*partials.*allowed"):
            ops.sample_combine(partials, heat)
    with pytest.raises(ValueError, match="first_id is 64; allowed: a multiple of 128"):
        ops.sample_partials(torch.zeros(2, 9), torch.ones(1).long(), keys_of(2), heat, 64, 100)


def test_random_arguments_never_crash() -> None:
    """Each call either gives tokens of the vocabulary (or -1), or a named error."""
    pick = np.random.default_rng(0)
    drawn, messages = 0, []
    for _ in range(400):
        rows, size = int(pick.integers(0, 5)), int(pick.integers(1, 400))
        logits = random_logits(rows, size, seed=int(pick.integers(1000)))
        if rows and pick.random() < 0.3:
            logits[pick.integers(rows), pick.integers(size)] = pick.choice(
                [math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45]
            )
        if pick.random() < 0.3:
            logits = logits.to(pick.choice([torch.bfloat16, torch.float16, torch.float64]))

        def option(values: list, dtype: torch.dtype, count: int = rows) -> object:
            if pick.random() < 0.5:
                return values[pick.integers(len(values))]
            shape = [(1,), (count,), (count + 1,), ()][pick.integers(4)]
            chosen = [values[pick.integers(len(values))] for _ in range(math.prod(shape))]
            return torch.tensor(chosen, dtype=dtype).reshape(shape)

        try:
            got = sample(
                logits,
                seed=option([0, 1, -5, 2**62], torch.int64),
                keys=keys_of(rows + int(pick.random() < 0.05)),
                temperature=option([0.0, 1.0, 0.3, 1e-20, 1e30, -1.0], torch.float32),
                top_k=option([0, 1, 3, size, 10**6, -3], torch.int64),
                top_p=option([0.0, 1.0, 0.5, 0.999, 1.5], torch.float32),
                min_p=option([0.0, 1.0, 0.1, -0.5], torch.float32),
                vocab_size=[None, size, 1, size + 1][pick.integers(4)],
            )
        except (ValueError, TypeError) as error:
            messages.append(str(error))
        else:
            assert ((got.token >= -1) & (got.token < size)).all()
            assert (got.logprob.isnan() == (got.token < 0)).all()
            assert not (got.sampled_logprob > 1e-6).any()
            drawn += 1
    assert drawn > 20
    assert len(messages) > 20
    assert all("megarlx.sample: " in m and "allowed: " in m for m in messages)
