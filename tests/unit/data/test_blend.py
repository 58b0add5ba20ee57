import os
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megarlx.data.blend import BLOCK, Blend, BlendError, Composition
from megarlx.data.native import index as _index
from megarlx.data.order import key_of, shuffled
from megarlx.data.samples import SourceEpoch, TokenSource
from megarlx.data.token_files import (
    CODES,
    HEADER,
    MAGIC,
    VERSION,
    TokenFile,
    TokenFileWriter,
    bin_path,
    idx_path,
)

S = 16


def source(
    folder: Path, name: str, documents: int, first: int = 0, seed: int = 3, longest: int = 40
) -> TokenSource:
    """Every token tells where it came from: ids count up from `first`."""
    rng = np.random.default_rng(documents)
    with TokenFileWriter(folder / name, "i4") as writer:
        for length in rng.integers(0, longest, documents):
            writer.add(np.arange(first, first + length))
            first += int(length)
    return TokenSource(name, TokenFile(folder / name), S, seed)


def three(folder: Path, seed: int = 3, schedule: list[Composition] | None = None) -> Blend:
    made = [
        source(folder, n, d, f) for n, d, f in (("a", 30, 0), ("b", 50, 10**4), ("c", 9, 10**6))
    ]
    schedule = schedule or [Composition(0, {"a": 0.6, "b": 0.3, "c": 0.1})]
    return Blend(made, schedule, seed)


def reference_sources(weights: list[float], count: int) -> list[int]:
    """Earliest deadline first, in exact fractions: source i may have its k-th sample once
    t·w > k - 1 and must have it by t·w >= k."""
    total = sum(map(Fraction, weights))
    shares, had, found = [Fraction(w) / total for w in weights], [0] * len(weights), []
    for t in range(1, count + 1):
        allowed = [i for i, w in enumerate(shares) if t * w > had[i]]
        chosen = min(allowed, key=lambda i: ((had[i] + 1 - t * shares[i]) / shares[i], i))
        had[chosen] += 1
        found.append(chosen)
    return found


@pytest.mark.parametrize(
    "weights", [[4, 3, 1], [1, 1, 1], [0, 5, 0], [0, 0, 2], [1 / 64, 63 / 64, 3]]
)
def test_sources_follow_the_weights_as_in_exact_arithmetic(
    tmp_path: Path, weights: list[float]
) -> None:
    blend = three(tmp_path, schedule=[Composition(0, dict(zip("abc", weights, strict=True)))])
    seen: Counter[int] = Counter()
    for index, expected in enumerate(reference_sources(weights, 2000)):
        assert blend.locate(index) == (expected, seen[expected])
        seen[expected] += 1


@pytest.mark.parametrize("consumed", [10, 1000, BLOCK - 1, BLOCK, 3 * BLOCK + 17])
def test_every_source_is_within_one_sample_of_its_share(tmp_path: Path, consumed: int) -> None:
    counts = three(tmp_path).samples_by_source(consumed)
    assert sum(counts.values()) == consumed
    for name, weight in {"a": 0.6, "b": 0.3, "c": 0.1}.items():
        assert abs(counts[name] - weight * consumed) < 1 + 1e-9


def test_counts_and_places_agree_across_block_edges(tmp_path: Path) -> None:
    blend = three(tmp_path)
    for start in (BLOCK - 3, 2 * BLOCK - 1):
        counts = list(blend.samples_by_source(start).values())
        for index in range(start, start + 6):
            at, number = blend.locate(index)
            assert number == counts[at]
            counts[at] += 1
        assert counts == list(blend.samples_by_source(start + 6).values())
    assert blend.tokens_by_source(100)["a"] == blend.samples_by_source(100)["a"] * S


def test_weights_change_at_the_first_sample_at_or_after_their_token_count(tmp_path: Path) -> None:
    change = BLOCK + 5
    schedule = [
        Composition(0, {"a": 1.0}),
        Composition(100 * S - 1, {"b": 1.0}),
        Composition(change * S, {"c": 2.0, "a": 2.0}),
    ]
    blend = three(tmp_path, schedule=schedule)
    where = [blend.locate(i)[0] for i in range(change + 200)]
    assert set(where[:100]) == {0}
    assert set(where[100:change]) == {1}
    assert Counter(where[change:]) == {0: 100, 2: 100}
    assert blend.locate(change + 199)[1] >= 0
    # A source goes on where it was left, it does not start again.
    first_a = next(i for i in range(change, change + 10) if where[i] == 0)
    assert blend.locate(first_a) == (0, 100)


def test_an_epoch_holds_every_token_once_but_for_the_rest(tmp_path: Path) -> None:
    made = source(tmp_path, "a", 60)
    for epoch in (0, 1):
        first = epoch * made.samples_per_epoch
        targets = np.concatenate(
            [made.read(first + i, 0).targets for i in range(made.samples_per_epoch)]
        )
        assert len(set(targets.tolist())) == len(targets)
        assert made.file.tokens - 1 - len(targets) < S
        assert set(targets.tolist()) <= set(range(made.file.tokens))
    orders = [
        [made.read(e * made.samples_per_epoch + i, 0).inputs[0] for i in range(9)] for e in (0, 1)
    ]
    assert orders[0] != orders[1]


def test_samples_equal_a_plain_reference(tmp_path: Path) -> None:
    made = source(tmp_path, "a", 25, seed=11)
    lengths = made.file.document_lengths().tolist()
    key = key_of(11, "a", 2)  # epoch 2
    order = _index.documents_at(np.arange(25), 25, seed=key).tolist()
    assert sorted(order) == list(range(25))
    stream = [(int(t), d) for d in order for t in made.file[d]]
    samples = (sum(lengths) - 1) // S
    assert samples == made.samples_per_epoch
    places = shuffled(samples, key_of(key, "samples"))
    for i, place in enumerate(places):
        part = stream[place * S : place * S + S + 1]
        sample = made.read(2 * samples + i, 0)
        assert sample.inputs.tolist() == [t for t, _ in part[:-1]]
        assert sample.targets.tolist() == [t for t, _ in part[1:]]
        documents = [d for _, d in part[:-1]]
        runs = [documents.count(d) for d in dict.fromkeys(documents)]
        assert list(sample.document_lengths) == runs


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 12))
def test_pieces_cover_each_sample_exactly(lengths: list[int], sequence_length: int) -> None:
    assume(sum(lengths) > sequence_length)
    epoch = SourceEpoch(np.array(lengths, np.int32), sequence_length, key=4)
    assert epoch.samples == (sum(lengths) - 1) // sequence_length
    for position in range(epoch.samples):
        pieces = epoch.pieces(position)
        assert sum(count for _, _, count in pieces) == sequence_length + 1
        assert all(count > 0 and first + count <= lengths[d] for d, first, count in pieces)


def test_a_block_starts_where_the_one_before_ended() -> None:
    weights = np.array([0.5, 0.3, 0.2])
    whole, numbers = _index.blend(weights, 1000)
    for cut in (0, 1, 137, 999):
        served = np.bincount(whole[:cut], minlength=3)
        after, rest = _index.blend(weights, 1000 - cut, served=served)
        assert after.tolist() == whole[cut:].tolist()
        assert rest.tolist() == numbers[cut:].tolist()
    for wrong in ([1, 2], [-1, 1, 0], [9, 0, 0]):
        with pytest.raises(ValueError, match="served"):
            _index.blend(weights, 5, served=np.array(wrong))


def test_the_order_is_a_function_of_seed_and_name_alone(tmp_path: Path) -> None:
    one, again, other = three(tmp_path), three(tmp_path), three(tmp_path, seed=4)
    indices = [0, 7, 123, 5, 1000, 7]
    samples = [one.sample(i).inputs.tolist() for i in indices]
    assert samples == [again.sample(i).inputs.tolist() for i in reversed(indices)][::-1]
    assert other.fingerprint() != one.fingerprint() == again.fingerprint()
    renamed = source(tmp_path, "z", 30)
    assert renamed.read(0, 0).inputs.tolist() != one.sources[0].read(0, 0).inputs.tolist()


def test_a_source_too_small_for_one_sample_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"source 'tiny' .*has \d+ tokens; .* needs 17"):
        source(tmp_path, "tiny", 3, longest=4)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([], "the first from_tokens is missing; it must be 0"),
        ([Composition(5, {"a": 1})], "the first from_tokens is 5"),
        ([Composition(0, {"a": 1}), Composition(0, {"b": 1})], "0 comes after 0; they must rise"),
        ([Composition(0, {"a": 1, "x": 1})], "no source is called x; there are a, b, c"),
        ([Composition(0, {"a": -1})], "weight of a is -1; it must be a number of at least 0"),
        ([Composition(0, {"a": float("nan")})], "weight of a is nan"),
        ([Composition(0, {"a": 0.0})], "all weights are 0"),
    ],
)
def test_schedules_that_cannot_work_are_refused(
    tmp_path: Path, schedule: list[Composition], message: str
) -> None:
    made = [source(tmp_path, name, 20) for name in "abc"]
    with pytest.raises(BlendError, match=message):
        Blend(made, schedule, 0)


TEN_BILLION = """
import resource, sys, time
from megarlx.data.blend import Blend, Composition
from megarlx.data.samples import TokenSource
from megarlx.data.token_files import TokenFile

def used():
    return time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

seconds, megabytes = used()
sources = [TokenSource(p[-2:], TokenFile(p, 50304), 4096, 0) for p in sys.argv[1:]]
blend = Blend(sources, [Composition(0, {s.name: 1.0 + i for i, s in enumerate(sources)})], 0)
last = sum(s.file.tokens for s in sources) // 4096
for index in (0, last // 2, last):  # from the start, from the middle, at the end
    assert blend.sample(index).inputs.sum() == 0
assert sum(blend.samples_by_source(last).values()) == last
for source in sources:
    source.epoch(0), source.epoch(1)
print(last * 4096, used()[0] - seconds, used()[1] - megabytes)
"""


def test_ten_billion_tokens_of_five_sources_are_indexed_in_seconds_and_little_memory(
    tmp_path: Path,
) -> None:
    """Real files, of which the .bin is a hole: the tokens are all 0 and take no room."""
    rng = np.random.default_rng(0)
    prefixes = [tmp_path / f"s{i}" for i in range(5)]
    for prefix in prefixes:
        lengths = rng.integers(1, 6000, 670_000, dtype=np.int32)
        ends = np.cumsum(lengths, dtype=np.int64)
        with open(idx_path(prefix), "wb") as file:
            count = len(lengths)
            file.write(HEADER.pack(MAGIC, VERSION, CODES[np.dtype("<u2")], count, count + 1))
            file.write(lengths.data)
            file.write(((ends - lengths) * 2).data)
            file.write(np.arange(count + 1, dtype=np.int64).data)
        with open(bin_path(prefix), "wb") as file:
            file.truncate(2 * int(ends[-1]))
    done = subprocess.run(
        [sys.executable, "-c", TEN_BILLION, *map(str, prefixes)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    tokens, seconds, megabytes = map(float, done.stdout.split())
    print(f"{tokens:.3g} tokens: {seconds:.2f} s, {megabytes:.0f} MB")
    assert tokens > 1e10
    assert seconds < 20  # a twentieth of it on an idle machine
    assert megabytes < 400  # the five .idx alone, mapped, are 67
