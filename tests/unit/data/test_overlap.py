"""Runs of tokens that questions share with token files are all found, and no others."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarlx.data import overlap
from megarlx.data.overlap import Runs
from megarlx.data.token_files import TokenFile, TokenFileWriter

IDS = st.lists(st.integers(0, 2), max_size=14)


def written(folder: Path, documents: list[list[int]]) -> TokenFile:
    with closing(TokenFileWriter(folder / "tokens", np.dtype("<u2"))) as writer:
        for ids in documents:
            writer.add(np.array(ids, np.uint16))
    return TokenFile(folder / "tokens")


def runs_of(ids: list[int], length: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)]


@settings(max_examples=80, deadline=None)
@given(st.lists(IDS, max_size=5), st.lists(IDS, max_size=5), st.integers(1, 5), st.integers(1, 9))
def test_counts_are_those_of_looking_at_every_place(
    tmp_path_factory: pytest.TempPathFactory,
    questions: list[list[int]],
    documents: list[list[int]],
    length: int,
    at_once: int,
) -> None:
    file = written(tmp_path_factory.mktemp("tokens"), documents)
    there = runs_of([i for ids in documents for i in ids], length)
    runs = Runs(questions, length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "TOKENS_AT_ONCE", at_once)  # runs lie across what is read at once
        counts = runs.counted_in(file)
    assert len(counts) == len({run for ids in questions for run in runs_of(ids, length)})
    for ids, places in zip(questions, runs.of_question, strict=True):
        assert counts[places].tolist() == [there.count(run) for run in runs_of(ids, length)]
    shared = [sum(run in there for run in runs_of(ids, length)) for ids in questions]
    assert runs.shared(counts) == shared


def test_equal_hashes_alone_are_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_hash(ids: np.ndarray, tokens: int) -> np.ndarray:
        return np.zeros(max(0, len(ids) - tokens + 1), np.uint64)

    monkeypatch.setattr(overlap, "_hashes", no_hash)
    runs = Runs([[1, 2, 3]], 3)
    counts = runs.counted_in(written(tmp_path, [[4, 5, 6, 1, 2, 3]]))
    assert counts.tolist() == [1]


def test_a_run_needs_a_token() -> None:
    with pytest.raises(ValueError, match="a run has 0 tokens"):
        Runs([[1]], 0)
