"""The index module against slow references; D documents, L tokens a sample, S samples."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch  # noqa: F401  its libraries, which the module is linked with, are loaded first
from hypothesis import given, settings
from hypothesis import strategies as st
from megarlx._index import blend, documents_at, permute, sample_index

SEEDS = st.integers(0, 2**64 - 1)
quick = settings(max_examples=60, deadline=None)


# permute


@quick
@given(n=st.integers(1, 3000), seed=SEEDS)
def test_permute_visits_every_index_once(n: int, seed: int) -> None:
    assert sorted(permute(np.arange(n), n, seed=seed)) == list(range(n))


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 65_535, 65_536, 65_537, 1_000_003])
def test_permute_is_a_bijection_at_the_edges_of_its_bit_widths(n: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed=7)), np.arange(n))


@quick
@given(n=st.integers(1, 2**62), seed=SEEDS, pick=st.integers(0, 2**62))
def test_permute_is_random_access(n: int, seed: int, pick: int) -> None:
    """An index means the same alone, in any order and in any shape; nothing of size n is made."""
    a, b = pick % n, (pick * 7 + 3) % n
    together = permute(np.array([[a, b], [b, a]]), n, seed=seed)
    assert together.shape == (2, 2)
    assert together[0, 0] == together[1, 1] == permute(np.array([a]), n, seed=seed)[0]
    assert together.min() >= 0
    assert together.max() < n
    assert (together[0, 0] == together[0, 1]) == (a == b)


def test_permute_of_strided_and_empty_arrays() -> None:
    assert permute(np.arange(0), 10, seed=1).shape == (0,)
    whole = permute(np.arange(100), 100, seed=1)
    assert np.array_equal(permute(np.arange(100)[::3], 100, seed=1), whole[::3])


def test_permute_depends_on_every_bit_of_the_seed() -> None:
    seen = {permute(np.arange(64), 64, seed=s).tobytes() for s in [0, *(1 << b for b in range(64))]}
    assert len(seen) == 65


@pytest.mark.parametrize("n", [3, 5, 16, 100])
def test_places_are_uniform_over_seeds(n: int) -> None:
    """χ² of where index 0 lands, and of the pair (0, 1), at about 5 sigma."""
    seeds = 4000
    landed = np.array([permute(np.arange(min(n, 2)), n, seed=s) for s in range(seeds)])
    counts = np.bincount(landed[:, 0], minlength=n)
    chi2 = ((counts - seeds / n) ** 2 / (seeds / n)).sum()
    assert chi2 < (n - 1) + 5 * np.sqrt(2 * (n - 1)) + 5
    distance = np.bincount((landed[:, 1] - landed[:, 0]) % n, minlength=n)[1:]
    expected = seeds / (n - 1)
    assert ((distance - expected) ** 2 / expected).sum() < (n - 2) + 5 * np.sqrt(2 * n) + 5


def test_every_order_of_three_comes_equally_often() -> None:
    orders = Counter(tuple(permute(np.arange(3), 3, seed=s)) for s in range(6000))
    assert set(orders) == set(itertools.permutations(range(3)))
    assert max(abs(count - 1000) for count in orders.values()) < 150


def test_neighbours_are_torn_apart() -> None:
    n = 100_000
    order = permute(np.arange(n), n, seed=3)
    steps = np.abs(np.diff(order))
    assert abs(steps.mean() / (n / 3) - 1) < 0.02
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.02


# sample_index


def slow_samples(
    lengths: list[int], length: int, epochs: int, seed: int
) -> list[list[tuple[int, int]]]:
    """Every sample as (document, token) pairs, out of the stream written down in full."""
    documents = documents_at(np.arange(epochs * len(lengths)), len(lengths), seed=seed)
    stream = [(int(d), token) for d in documents for token in range(lengths[d])]
    count = (len(stream) - 1) // length
    return [stream[s * length : (s + 1) * length + 1] for s in range(count)]


def read_samples(
    lengths: list[int], length: int, epochs: int, seed: int
) -> list[list[tuple[int, int]]]:
    """The same as a data loader would: from the index alone."""
    array = np.array(lengths, dtype=np.int32)
    positions, offsets = sample_index(array, length, epochs=epochs, seed=seed)
    assert positions.dtype == np.int64
    assert offsets.dtype == np.int32
    assert len(positions) == len(offsets)
    samples = []
    for position, offset in zip(positions[:-1], offsets[:-1], strict=True):
        tokens: list[tuple[int, int]] = []
        while len(tokens) < length + 1:
            document = int(documents_at(np.array([position]), len(lengths), seed=seed)[0])
            tokens += [(document, t) for t in range(offset, lengths[document])]
            position, offset = position + 1, 0
        samples.append(tokens[: length + 1])
    # Each sample's last token is the next one's first.
    for sample, position, offset in zip(samples, positions[1:], offsets[1:], strict=True):
        document = documents_at(np.array([position]), len(lengths), seed=seed)[0]
        assert sample[-1] == (document, offset)
    return samples


@quick
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=25),
    length=st.integers(1, 30),
    epochs=st.integers(1, 4),
    seed=SEEDS,
)
def test_samples_are_those_of_the_stream_written_down(
    lengths: list[int], length: int, epochs: int, seed: int
) -> None:
    if sum(lengths) * epochs < length + 1:
        with pytest.raises(ValueError, match=rf"at least sequence_length \+ 1 = {length + 1}"):
            sample_index(np.array(lengths, dtype=np.int32), length, epochs=epochs, seed=seed)
    else:
        expected = slow_samples(lengths, length, epochs, seed)
        assert read_samples(lengths, length, epochs, seed) == expected


def test_every_epoch_holds_every_document_once_in_an_order_of_its_own() -> None:
    order = documents_at(np.arange(4 * 97), 97, seed=5).reshape(4, 97)
    assert all(np.array_equal(np.sort(epoch), np.arange(97)) for epoch in order)
    assert len({epoch.tobytes() for epoch in order}) == 4
    backwards = documents_at(np.arange(4 * 97)[::-1], 97, seed=5)
    assert np.array_equal(backwards[::-1], order.ravel())


def test_more_epochs_continue_the_same_samples() -> None:
    lengths = np.arange(1, 60, dtype=np.int32)
    one, two = (sample_index(lengths, 7, epochs=e, seed=9) for e in (1, 2))
    for short, long in zip(one, two, strict=True):
        assert np.array_equal(short, long[: len(short)])


def test_ten_billion_tokens_are_indexed_in_seconds() -> None:
    lengths = np.random.default_rng(0).integers(1, 6000, 3_400_000, dtype=np.int32)
    assert lengths.sum(dtype=np.int64) > 10**10
    start = time.process_time()
    positions, _ = sample_index(lengths, 4096, epochs=1, seed=1)
    source, _ = blend([0.6, 0.2, 0.07, 0.05, 0.02], len(positions) - 1)
    assert time.process_time() - start < 10
    assert len(source) == (lengths.sum(dtype=np.int64) - 1) // 4096


def test_other_threads_run_while_the_index_is_made() -> None:
    """Without the GIL released, this thread could not count while the other is inside the call."""
    lengths = np.ones(3_000_000, dtype=np.int32)
    made: list[Any] = []

    def make() -> None:
        made.append(sample_index(lengths, 1, epochs=1, seed=0))

    worker = threading.Thread(target=make)
    worker.start()
    turns = 0
    while worker.is_alive():
        turns += 1
        time.sleep(0.001)
    assert turns > 5
    assert len(made[0][0]) == 3_000_000


# blend


def check_blend(weights: list[float], n: int, slack: Fraction = Fraction(0)) -> None:
    source, index = blend(weights, n)
    assert source.dtype == np.int16
    assert index.dtype == np.int64
    whole = sum(map(Fraction, weights))
    shares = [Fraction(w) / whole for w in weights]
    counts = [0] * len(weights)
    for t, (i, k) in enumerate(zip(source.tolist(), index.tolist(), strict=True), start=1):
        assert k == counts[i]
        counts[i] += 1
        for count, share in zip(counts, shares, strict=True):
            assert abs(count - share * t) < 1 + slack


@quick
@given(
    weights=st.lists(st.integers(0, 2**20), min_size=1, max_size=12).filter(any),
    n=st.integers(0, 300),
)
def test_no_prefix_is_off_by_one_item(weights: list[int], n: int) -> None:
    check_blend([float(w) for w in weights], n, Fraction(1, 10**12))


@quick
@given(weights=st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=8))
def test_no_prefix_is_off_by_one_item_for_any_floats(weights: list[float]) -> None:
    check_blend(weights, 150, Fraction(1, 10**12))


@pytest.mark.parametrize("small", [20, 60])
def test_many_small_sources_beside_a_large_one_are_not_late(small: int) -> None:
    check_blend([0.5, *[0.5 / small] * small], 5 * small, Fraction(1, 10**12))
    check_blend([float(i) for i in range(1, small)], 3 * small, Fraction(1, 10**12))


def test_shares_are_kept_where_serving_the_largest_debt_first_fails() -> None:
    weights = [13, 4, 1, 49, 4, 40]
    debts, worst = [0] * 6, 0
    for _ in range(sum(weights)):
        debts = [debt + weight for debt, weight in zip(debts, weights, strict=True)]
        debts[debts.index(max(debts))] -= sum(weights)
        worst = max(worst, *map(abs, debts))
    assert worst > sum(weights)  # more than one item
    check_blend([float(w) for w in weights], 3 * sum(weights), Fraction(1, 10**12))


def test_equal_weights_take_turns_and_binary_shares_are_exact() -> None:
    assert blend([1, 1, 1], 7)[0].tolist() == [0, 1, 2, 0, 1, 2, 0]
    source, index = blend([0.5, 0.25, 0.25], 4000)
    assert np.bincount(source).tolist() == [2000, 1000, 1000]
    assert index[source == 1].tolist() == list(range(1000))
    assert blend([3, 1], 8)[0].tolist() == blend([0.75, 0.25], 8)[0].tolist()


def test_a_source_of_weight_zero_is_never_taken() -> None:
    source, _ = blend([0.0, 1.0, 0.0], 50)
    assert set(source.tolist()) == {1}


def test_a_longer_blend_begins_with_the_shorter() -> None:
    weights = [0.6, 0.2, 0.07, 0.05, 0.02]
    short, long = blend(weights, 1000), blend(weights, 5000)
    assert np.array_equal(short[0], long[0][:1000])
    assert np.array_equal(short[1], long[1][:1000])


def test_a_million_steps_keep_every_share() -> None:
    weights = np.array([0.6, 0.2, 0.07, 0.05, 0.02, 1e-5])
    source, _ = blend(weights, 1_000_000)
    t = np.arange(1, 1_000_001)
    for i, share in enumerate(weights / weights.sum()):
        assert np.abs(np.cumsum(source == i) - share * t).max() < 1 + 1e-6


# bad input

INT32 = np.array([3, 4], dtype=np.int32)
BAD: dict[str, tuple[Any, str]] = {
    "index": (lambda: permute(np.array([0, 5]), 5, seed=0), r"indices\[1\] is 5; .* n = 5"),
    "below": (lambda: permute(np.array([-1]), 5, seed=0), r"indices\[0\] is -1"),
    "float": (lambda: permute(np.array([0.5]), 5, seed=0), r"indices.dtype is float64; .* int64"),
    "n": (lambda: permute(np.array([0]), -1, seed=0), r"n is -1; allowed: 0 to 2\^62"),
    "huge n": (lambda: permute(np.array([0]), 2**70, seed=0), rf"n is {2**70}"),
    "seed": (lambda: permute(np.array([0]), 1, seed=-1), r"seed is -1; allowed: 0 to 2\^64 - 1"),
    "huge seed": (lambda: permute(np.array([0]), 1, seed=2**64), rf"seed is {2**64}"),
    "position": (lambda: documents_at(np.array([-3]), 2, seed=0), r"positions\[0\] is -3"),
    "documents": (lambda: documents_at(np.array([3]), 0, seed=0), r"documents is 0"),
    "negative": (
        lambda: sample_index(np.array([3, -4], dtype=np.int32), 2, epochs=1, seed=0),
        r"lengths\[1\] is -4; allowed: 0 or more",
    ),
    "dtype": (lambda: sample_index(np.array([3]), 2, epochs=1, seed=0), "lengths.dtype is int64"),
    "shape": (lambda: sample_index(INT32[None], 2, epochs=1, seed=0), r"lengths.ndim is 2"),
    "length": (lambda: sample_index(INT32, 0, epochs=1, seed=0), r"sequence_length is 0"),
    "epochs": (lambda: sample_index(INT32, 2, epochs=0, seed=0), r"epochs is 0; allowed: 1 to"),
    "overflow": (
        lambda: sample_index(INT32, 2, epochs=2**62, seed=0),
        rf"epochs is {2**62}; allowed: less than 2\^63 tokens in all, of 7 in an epoch",
    ),
    "empty": (
        lambda: sample_index(np.array([], dtype=np.int32), 2, epochs=1, seed=0),
        r"number of tokens is 0; allowed: at least sequence_length \+ 1 = 3",
    ),
    "weight": (lambda: blend([0.5, -0.1], 3), r"weights\[1\] is -0.1; allowed: finite, >= 0"),
    "nan": (lambda: blend([float("nan")], 3), r"weights\[0\] is nan"),
    "inf": (lambda: blend([1, float("inf")], 3), r"weights\[1\] is inf"),
    "zero": (lambda: blend([0.0, 0.0], 3), r"sum of weights is 0; allowed: more than 0"),
    "none": (lambda: blend([], 3), r"number of weights is 0; allowed: 1 to 32767"),
    "weights shape": (lambda: blend([[1.0]], 3), r"weights.ndim is 2"),
    "blend n": (lambda: blend([1.0], -1), r"n is -1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=rf"megarlx\._index: .*{message}"):
        call()


def test_weights_of_any_scale_do_not_overflow() -> None:
    for weights in ([1e308, 1e308, 1e308], [5e-324, 5e-324], [1e-300, 1e300]):
        source, _ = blend(weights, 100)
        expected = 33 if len(weights) == 3 else (0 if weights[0] < weights[1] else 50)
        assert abs(int((source == 0).sum()) - expected) <= 1
