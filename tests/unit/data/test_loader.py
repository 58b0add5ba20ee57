import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megarlx.data.blend import Blend, Composition
from megarlx.data.held_tokens import HeldTokens
from megarlx.data.loader import Batch, BatchLayout, Loader
from megarlx.data.samples import Sample, TokenSource
from megarlx.data.token_files import TokenFile, TokenFileWriter, bin_path

S = 8


def blend(folder: Path, seed: int = 0, vocab_size: int | None = None) -> Blend:
    sources = []
    for number, name in enumerate("ab"):
        rng = np.random.default_rng(number)
        if not bin_path(folder / name).exists():
            with TokenFileWriter(folder / name, "u2") as writer:
                for length in rng.integers(0, 15, 40):
                    writer.add(rng.integers(0, 1000, length))
        sources.append(TokenSource(name, TokenFile(folder / name, vocab_size), S, seed))
    return Blend(sources, [Composition(0, {"a": 2.0, "b": 1.0})], seed)


def rows(batches: list[Batch]) -> list[list[int]]:
    return [row for batch in batches for row in batch.inputs.tolist()]


def held(name: str, seed: int = 0) -> TokenSource:
    documents = np.random.default_rng(9).integers(2000, 3000, (6, 20)).tolist()
    return TokenSource(name, HeldTokens("rollouts", documents), S, seed)


def test_a_run_that_goes_on_may_add_a_source_from_its_tokens_on(tmp_path: Path) -> None:
    """And nothing that was read before may be another."""
    first, layout = blend(tmp_path), BatchLayout(6, 6)
    before = Loader(first, layout, prefetch_steps=0)
    expected = run(before, 2)
    state = before.state()
    sources, weights = [*first.sources, held("own")], {"a": 2.0, "b": 1.0}

    def loader(parts: list[Composition]) -> Loader:
        made = Loader(Blend(sources, parts, 0), layout, prefetch_steps=0)
        made.load_state(state)
        return made

    added = Composition(12 * S, {**weights, "own": 3.0})
    longer = loader([Composition(0, weights), added])
    assert [longer.dataset.sample(i).inputs.tolist() for i in range(12)] == expected
    new = run(longer, 4)
    assert sum(row[0] >= 2000 for row in new) == 12  # half of them, from the first sample on
    plain = Loader(first, layout, prefetch_steps=0)
    plain.load_state(state)
    assert [row for row in new if row[0] < 2000] == run(plain, 2)
    for wrong in (
        [Composition(0, {"a": 1.0, "b": 1.0}), added],
        [Composition(0, weights), Composition(11 * S, added.weights)],
        [Composition(0, added.weights)],
    ):
        with pytest.raises(ValueError, match="schedule was"):
            loader(wrong)


def run(loader: Loader, steps: int) -> list[list[int]]:
    try:
        return [row for _ in range(steps) for row in rows(loader.next_step())]
    finally:
        loader.close()


@pytest.mark.parametrize(("size", "microbatch"), [(1, 12), (1, 1), (2, 3), (3, 2), (4, 1), (12, 1)])
def test_every_layout_sees_the_same_global_batches(
    tmp_path: Path, size: int, microbatch: int
) -> None:
    data = blend(tmp_path)
    expected = [data.sample(i).inputs.tolist() for i in range(36)]
    loaders = [Loader(data, BatchLayout(12, microbatch, rank, size)) for rank in range(size)]
    for step in range(3):
        batches = [loader.next_step() for loader in loaders]
        found = [row for rank in batches for row in rows(rank)]
        assert found == expected[step * 12 : step * 12 + 12]
        assert all(len(rank) == 12 // (size * microbatch) for rank in batches)
    for loader in loaders:
        loader.close()


def test_targets_are_the_inputs_one_further(tmp_path: Path) -> None:
    [batch] = Loader(blend(tmp_path), BatchLayout(4, 4), prefetch_steps=0).next_step()
    assert batch.inputs.shape == batch.targets.shape == (4, S)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert batch.inputs.dtype == torch.int64


@pytest.mark.parametrize("prefetch", [0, 1, 5])
@pytest.mark.parametrize("cut", [1, 5, 9])
def test_a_resumed_run_sees_what_the_undisturbed_one_sees(
    tmp_path: Path, prefetch: int, cut: int
) -> None:
    """The files hold about one epoch for 9 steps of 8, so every cut lies near some epoch's end."""
    whole = run(Loader(blend(tmp_path), BatchLayout(8, 4), prefetch_steps=prefetch), 14)
    first = Loader(blend(tmp_path), BatchLayout(8, 4), prefetch_steps=prefetch)
    before = [row for _ in range(cut) for row in rows(first.next_step())]
    state = json.loads(json.dumps(first.state()))
    first.close()
    second = Loader(blend(tmp_path), BatchLayout(8, 2), prefetch_steps=prefetch)
    second.load_state(state)
    assert before + run(second, 14 - cut) == whole


def test_a_resume_at_the_very_end_of_an_epoch_goes_on(tmp_path: Path) -> None:
    data = blend(tmp_path)
    per_epoch = data.sources[0].samples_per_epoch
    only_a = Blend(data.sources[:1], [Composition(0, {"a": 1.0})], 0)
    loader = Loader(only_a, BatchLayout(1, 1), consumed_sequences=per_epoch)
    after = run(loader, per_epoch)
    first = run(Loader(only_a, BatchLayout(1, 1)), per_epoch)
    assert len(after) == per_epoch
    assert after != first
    assert loader.consumed_sequences == 2 * per_epoch


def test_the_state_is_the_cursor_of_consumed_batches_not_of_prefetched_ones(tmp_path: Path) -> None:
    loader = Loader(blend(tmp_path), BatchLayout(4, 2), prefetch_steps=6)
    loader.next_step()
    assert loader.state()["consumed_sequences"] == 4
    loader.close()


def test_moving_the_cursor_forgets_what_was_prefetched(tmp_path: Path) -> None:
    data = blend(tmp_path)
    loader = Loader(data, BatchLayout(2, 2))
    loader.next_step()
    loader.load_state({**loader.state(), "consumed_sequences": 20})
    assert rows(loader.next_step()) == [data.sample(i).inputs.tolist() for i in (20, 21)]
    loader.consumed_sequences = 6
    assert rows(loader.next_step()) == [data.sample(i).inputs.tolist() for i in (6, 7)]
    loader.close()


def test_changed_data_is_refused_with_the_difference(tmp_path: Path) -> None:
    state = json.loads(json.dumps(Loader(blend(tmp_path), BatchLayout(1, 1)).state()))
    with pytest.raises(ValueError, match="seed was 0, is 5"):
        Loader(blend(tmp_path, seed=5), BatchLayout(1, 1)).load_state(state)
    raw = bytearray(bin_path(tmp_path / "b").read_bytes())
    raw[40] ^= 1
    bin_path(tmp_path / "b").write_bytes(raw)
    with pytest.raises(ValueError, match=r"sources\.b\.bin_sampled_sha256 was"):
        Loader(blend(tmp_path), BatchLayout(1, 1)).load_state(state)


def test_documents_follow_one_another_through_the_rows(tmp_path: Path) -> None:
    data = blend(tmp_path)
    loader = Loader(data, BatchLayout(6, 3), with_documents=True, prefetch_steps=0)
    for batch in loader.next_step():
        assert batch.cu_seqlens is not None
        assert batch.cu_seqlens.dtype == torch.int32
        lengths = [n for i in batch.indices for n in data.sample(i).document_lengths]
        assert batch.cu_seqlens.tolist() == np.cumsum([0, *lengths]).tolist()
        assert batch.cu_seqlens[-1] == 3 * S


def test_documents_can_be_padded_to_a_fixed_number(tmp_path: Path) -> None:
    layout = BatchLayout(2, 2)
    padded = Loader(blend(tmp_path), layout, with_documents=True, documents_at_most=30)
    plain = Loader(blend(tmp_path), layout, with_documents=True)
    [a], [b] = padded.next_step(), plain.next_step()
    assert a.cu_seqlens is not None
    assert b.cu_seqlens is not None
    assert len(a.cu_seqlens) == 31
    assert a.cu_seqlens[: len(b.cu_seqlens)].tolist() == b.cu_seqlens.tolist()
    assert set(a.cu_seqlens[len(b.cu_seqlens) :].tolist()) == {2 * S}
    too_few = Loader(
        blend(tmp_path), layout, with_documents=True, documents_at_most=1, prefetch_steps=0
    )
    with pytest.raises(ValueError, match="documents; documents_at_most allows 1"):
        too_few.next_step()
    padded.close()
    plain.close()


def test_an_id_outside_the_vocabulary_surfaces_through_the_thread(tmp_path: Path) -> None:
    loader = Loader(blend(tmp_path, vocab_size=500), BatchLayout(8, 8))
    with pytest.raises(ValueError, match=r"\.bin: token \d+ has id \d+; the vocabulary allows"):
        run(loader, 20)


def test_counts_may_be_asked_for_while_the_thread_reads(tmp_path: Path) -> None:
    fresh = blend(tmp_path)
    expected = [blend(tmp_path).tokens_by_source(n) for n in (40_000, 90_000)]
    with ThreadPoolExecutor(8) as pool:
        places = list(pool.map(fresh.locate, [50_000 + i % 7 for i in range(64)]))
        counts = list(pool.map(fresh.tokens_by_source, [40_000, 90_000] * 20))
    assert places == [blend(tmp_path).locate(50_000 + i % 7) for i in range(64)]
    assert counts == expected * 20


class Slow:
    """Samples are their own index; counts who asks for them."""

    sequence_length = 1

    def __init__(self) -> None:
        self.asked: list[tuple[int, str]] = []
        self.enough = threading.Event()

    def sample(self, index: int) -> Sample:
        self.asked.append((index, threading.current_thread().name))
        if index >= 5:
            self.enough.set()
        value = np.array([index])
        return Sample(value, value, None, (1,), 0)

    def fingerprint(self) -> dict[str, object]:
        return {}

    def tokens_by_source(self, consumed_sequences: int) -> dict[str, int]:
        return {}


def test_the_thread_works_ahead_and_keeps_the_order() -> None:
    data = Slow()
    loader = Loader(data, BatchLayout(2, 2), prefetch_steps=2)
    assert rows(loader.next_step()) == [[0], [1]]
    assert data.enough.wait(10), "nothing was prefetched"
    assert [i for i, _ in data.asked] == sorted(i for i, _ in data.asked)
    assert all("megarlx-loader" in name for _, name in data.asked)
    assert rows(loader.next_step()) == [[2], [3]]
    loader.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (10, 2, 0, 2, "sft"),
            r"sft.sequences_per_step is 10; .* x dp = 4 must divide it \(nearest: 8 or 12\)",
        ),
        ((4, 0, 0, 1), "sequences_per_microbatch 0; allowed are at least 1"),
        ((4, 1, 2, 2), "rank is 2; allowed 0 to 1"),
    ],
)
def test_batches_that_cannot_be_dealt_out_are_refused(
    arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        BatchLayout(*arguments)
