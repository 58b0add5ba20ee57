"""Flat buffers cut into shards: the pieces of any layout tile every tensor exactly once."""

from math import prod

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megarlx.parallel.data_parallel import ALIGNMENT, FlatLayout
from megarlx.parallel.metadata import ParameterLayout, Piece, flat_pieces

SHAPES = st.one_of(
    st.tuples(st.integers(1, 300)), st.tuples(st.integers(1, 40), st.integers(1, 37))
)
PARAMETERS = st.lists(st.tuples(SHAPES, st.booleans()), min_size=1, max_size=9)


def named(parameters: list) -> list[tuple[str, tuple[int, ...], bool]]:
    return [(f"p{i}", shape, decays) for i, (shape, decays) in enumerate(parameters)]


def piece(name: str, shape: tuple[int, ...], dim: int, start: int, offset: int, size: int) -> Piece:
    return Piece(name, shape, dim, start, offset, size, (0,), False, True)


def whole(name: str, shape: tuple[int, ...], decays: bool) -> ParameterLayout:
    return ParameterLayout(shape, (piece(name, shape, 0, 0, 0, shape[0]),), decays)


@given(PARAMETERS, st.integers(1, 5), st.integers(1, 2000))
@settings(max_examples=150, deadline=None)
def test_the_shards_of_all_ranks_tile_every_tensor_exactly_once(
    parameters: list, ranks: int, bucket_elements: int
) -> None:
    entries = named(parameters)
    layout = FlatLayout.make(entries, ranks, bucket_elements)
    layouts = {name: whole(name, shape, decays) for name, shape, decays in entries}
    seen = {name: np.zeros(shape, int) for name, shape, _ in entries}
    for rank in range(ranks):
        for piece, start, block in layout.chunks(layouts, rank):
            assert 0 <= start <= start + prod(block.size) <= layout.shard_size
            window = tuple(slice(a, a + n) for a, n in zip(block.start, block.size, strict=True))
            seen[piece.name][window] += 1
    assert all((count == 1).all() for count in seen.values())


@given(PARAMETERS, st.integers(1, 5), st.integers(1, 2000))
@settings(max_examples=150, deadline=None)
def test_a_chunk_holds_the_elements_that_it_names(
    parameters: list, ranks: int, bucket_elements: int
) -> None:
    entries = named(parameters)
    layout = FlatLayout.make(entries, ranks, bucket_elements)
    layouts = {name: whole(name, shape, decays) for name, shape, decays in entries}
    tensors = {
        name: np.arange(prod(shape)).reshape(shape) + 1_000_000 * i
        for i, (name, shape, _) in enumerate(entries)
    }
    buffer = np.full(layout.size, -1)
    for slot in layout.slots:
        buffer[slot.start : slot.stop] = tensors[slot.name].reshape(-1)
    for rank in range(ranks):
        shard = np.concatenate([buffer[a:b] for a, b, _ in layout.parts(rank)])
        for piece, start, block in layout.chunks(layouts, rank):
            window = tuple(slice(a, a + n) for a, n in zip(block.start, block.size, strict=True))
            found = shard[start : start + prod(block.size)].reshape(block.size)
            assert (found == tensors[piece.name][window]).all()


@given(PARAMETERS, st.integers(1, 5), st.integers(1, 2000))
@settings(max_examples=100, deadline=None)
def test_buckets_are_even_over_ranks_and_decayed_parameters_come_first(
    parameters: list, ranks: int, bucket_elements: int
) -> None:
    entries = named(parameters)
    layout = FlatLayout.make(entries, ranks, bucket_elements)
    assert all((b - a) % (ALIGNMENT * ranks) == 0 for a, b in layout.buckets)
    assert [a for a, _ in layout.buckets] == [0, *[b for _, b in layout.buckets[:-1]]]
    decays = {name: decay for name, _, decay in entries}
    for rank in range(ranks):
        for start, stop, shard_start in layout.parts(rank):
            inside = [s for s in layout.slots if s.start < stop and s.stop > start]
            for slot in inside:
                assert decays[slot.name] == (shard_start < layout.decayed_shard_size)


def test_a_fused_and_padded_matrix_shows_only_its_global_parts() -> None:
    # Rows 0-3 are rows 4-7 of q, rows 4-5 are k, rows 6-8 belong to nothing.
    layout = ParameterLayout(
        (9, 5),
        (piece("q", (8, 5), 0, 0, 4, 4), piece("k", (2, 5), 0, 4, 0, 2)),
        weight_decay=True,
    )
    found = [(p.name, offset, b.start, b.size) for p, offset, b in flat_pieces(layout, 3, 45)]
    assert found == [
        ("q", 3, (4, 3), (1, 2)),
        ("q", 5, (5, 0), (3, 5)),
        ("k", 20, (0, 0), (2, 5)),
    ]


def test_a_matrix_split_by_columns_shows_its_columns() -> None:
    # Of a 3 x 8 matrix this rank holds the columns 4-7.
    layout = ParameterLayout((3, 4), (piece("o", (3, 8), 1, 0, 4, 4),), weight_decay=True)
    found = [(offset, b.start, b.size) for _, offset, b in flat_pieces(layout, 1, 12)]
    assert found == [(1, (0, 5), (1, 3)), (4, (1, 4), (2, 4))]


@given(st.integers(1, 12), st.integers(1, 9), st.data())
@settings(max_examples=200, deadline=None)
def test_a_flat_range_is_at_most_three_rectangles(
    rows: int, columns: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, rows * columns))
    stop = data.draw(st.integers(start, rows * columns))
    found = list(flat_pieces(whole("w", (rows, columns), True), start, stop))
    assert len(found) <= 3
    assert sum(prod(block.size) for _, _, block in found) == stop - start
