import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarlx.data.token_files import (
    HEADER,
    TokenFile,
    TokenFileError,
    TokenFileWriter,
    bin_path,
    dtype_for,
    idx_path,
)

DOCUMENTS = [[3, 1, 4], [], [1, 5, 9, 2, 6], [5], [3, 5]]


def write(
    prefix: Path, documents: list[list[int]] = DOCUMENTS, dtype: str = "u2", sync: bool = True
) -> Path:
    with TokenFileWriter(prefix, dtype, sync) as writer:
        for document in documents:
            writer.add(document)
    return prefix


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "i8"])
def test_what_is_written_is_read_back(tmp_path: Path, dtype: str) -> None:
    tokens = TokenFile(write(tmp_path / "a", dtype=dtype))
    assert [tokens[i].tolist() for i in range(len(tokens))] == DOCUMENTS
    assert tokens.tokens == 11
    assert tokens.document_bounds().tolist() == [0, 3, 3, 8, 9, 11]
    assert tokens.document_lengths().tolist() == [3, 0, 5, 1, 2]
    assert tokens.span(2, 5).tolist() == [4, 1, 5]


@pytest.mark.parametrize("documents", [[], [[]], [[], []]])
def test_empty_files_are_files(tmp_path: Path, documents: list[list[int]]) -> None:
    tokens = TokenFile(write(tmp_path / "a", documents))
    assert (len(tokens), tokens.tokens) == (len(documents), 0)
    assert tokens.fingerprint()["bin_bytes"] == 0


@pytest.mark.parametrize("dtype", ["u1", "u2", "i4"])
def test_megatron_reads_what_we_write(tmp_path: Path, dtype: str) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    theirs = megatron.IndexedDataset(str(write(tmp_path / "a", dtype=dtype)))
    assert [theirs[i].tolist() for i in range(len(theirs))] == DOCUMENTS
    assert theirs.document_indices.tolist() == list(range(len(DOCUMENTS) + 1))


@pytest.mark.parametrize("per_document", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_we_read_what_megatron_writes(tmp_path: Path, per_document: int, dtype: type) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    import torch

    prefix, rng = tmp_path / "a", np.random.default_rng(0)
    builder = megatron.IndexedDatasetBuilder(str(bin_path(prefix)), dtype=dtype)
    documents = []
    for _ in range(7):
        sentences = [rng.integers(0, 500, rng.integers(1, 9)) for _ in range(per_document)]
        for sentence in sentences:
            builder.add_item(torch.from_numpy(sentence))
        builder.end_document()
        documents.append(np.concatenate(sentences).tolist())
    builder.finalize(str(idx_path(prefix)))
    ours = TokenFile(prefix)
    assert [ours[i].tolist() for i in range(len(ours))] == documents
    assert ours.document_lengths().tolist() == [len(d) for d in documents]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_both_write_the_same_bytes(tmp_path: Path) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    import torch

    write(tmp_path / "ours")
    builder = megatron.IndexedDatasetBuilder(str(bin_path(tmp_path / "theirs")), dtype=np.uint16)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)])
    builder.finalize(str(idx_path(tmp_path / "theirs")))
    for path in (bin_path, idx_path):
        assert path(tmp_path / "ours").read_bytes() == path(tmp_path / "theirs").read_bytes()


def test_multimodal_mode_bytes_are_accepted(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a")
    with open(idx_path(prefix), "ab") as stream:
        stream.write(b"\0" * len(DOCUMENTS))
    assert TokenFile(prefix)[2].tolist() == DOCUMENTS[2]


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"MMIDIDY", r"starts with b'MMIDIDY.*expected b'MMIDIDX"),
        (9, struct.pack("<Q", 2), "version is 2; expected 1"),
        (17, b"\x09", "dtype code is 9; allowed are 1 "),
        (17, b"\x07", r"dtype code is 7 \(float32\); allowed are"),
        (18, struct.pack("<Q", 6), "has 142 bytes; 6 sequences and 6 document entries need 154"),
        (18, struct.pack("<Q", 2**63), "bytes; 9223372036854775808 sequences"),
        (34, struct.pack("<i", -3), "sequence 0 has length -3"),
        (54, struct.pack("<q", 1), "sequence 0 lies at byte 1 .* expected 0"),
        (62, struct.pack("<q", 10**12), "sequence 1 lies at byte 1000000000000"),
        (94, struct.pack("<q", 1), "document starts go from 1 to 5"),
        (102, struct.pack("<q", 4), "document 1 starts at sequence 4 and ends at 2"),
        (134, struct.pack("<q", 99), "from 0 to 99; expected from 0 to 5"),
    ],
)
def test_a_damaged_index_is_named_with_value_and_expectation(
    tmp_path: Path, at: int, value: bytes, message: str
) -> None:
    prefix = write(tmp_path / "a")
    raw = bytearray(idx_path(prefix).read_bytes())
    raw[at : at + len(value)] = value
    idx_path(prefix).write_bytes(raw)
    with pytest.raises(TokenFileError, match=message) as error:
        TokenFile(prefix)
    assert str(idx_path(prefix)) in str(error.value)


@pytest.mark.parametrize(("change", "state"), [(-2, "is truncated"), (2, "is too long")])
def test_a_bin_of_the_wrong_size_is_named(tmp_path: Path, change: int, state: str) -> None:
    prefix = write(tmp_path / "a")
    raw = bin_path(prefix).read_bytes()
    bin_path(prefix).write_bytes(raw[:change] if change < 0 else raw + b"\0" * change)
    with pytest.raises(TokenFileError, match=f"{state}: it has {22 + change} bytes") as error:
        TokenFile(prefix)
    assert str(bin_path(prefix)) in str(error.value)


def test_an_id_outside_the_vocabulary_is_named_when_read(tmp_path: Path) -> None:
    tokens = TokenFile(write(tmp_path / "a"), vocab_size=9)
    assert tokens[0].tolist() == DOCUMENTS[0]
    with pytest.raises(TokenFileError, match=r"a\.bin: token 5 has id 9; .* allows 0 to 8"):
        tokens[2]
    with pytest.raises(TokenFileError, match="token 1 has id -7"):
        TokenFile(write(tmp_path / "b", [[1, -7]], "i4"), vocab_size=9).span(0, 2)


def test_reading_outside_the_file_is_an_error(tmp_path: Path) -> None:
    tokens = TokenFile(write(tmp_path / "a"))
    for bad in (-1, 5):
        with pytest.raises(IndexError, match=f"document {bad}; allowed 0 to 4"):
            tokens[bad]
    with pytest.raises(IndexError, match="tokens 3 to 12; there are 11"):
        tokens.span(3, 12)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 141), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_mutated_index_gives_an_error_or_a_consistent_file(
    tmp_path_factory: pytest.TempPathFactory, mutations: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    prefix = write(folder / "a", sync=False)
    raw = bytearray(idx_path(prefix).read_bytes())
    for at, value in mutations:
        raw[at] = value
    idx_path(prefix).write_bytes(raw)
    check_error_or_consistent(prefix)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_as_index_give_an_error_or_a_consistent_file(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, with_header: bool
) -> None:
    prefix = write(tmp_path_factory.getbasetemp() / "fuzz" / "b", sync=False)
    header = idx_path(prefix).read_bytes()[: HEADER.size] if with_header else b""
    idx_path(prefix).write_bytes(header + raw)
    check_error_or_consistent(prefix)


def check_error_or_consistent(prefix: Path) -> None:
    error, tokens = "", None
    try:
        tokens = TokenFile(prefix)
    except TokenFileError as refused:
        error = str(refused)
    if tokens is None:
        assert str(prefix) in error
        return
    # Accepted: then every byte of the .bin belongs to exactly one document, in order.
    joined = b"".join(tokens[i].tobytes() for i in range(len(tokens)))
    assert joined == bin_path(prefix).read_bytes()


def test_an_interrupted_write_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    def write_half() -> None:
        with TokenFileWriter(tmp_path / "a", "u2") as writer:
            writer.add([1, 2])
            assert not idx_path(tmp_path / "a").exists()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_ids_that_do_not_fit_the_type_are_refused(tmp_path: Path) -> None:
    with TokenFileWriter(tmp_path / "a", "u2") as writer:
        for bad in ([70000], [-1]):
            with pytest.raises(TokenFileError, match=f"document 0 holds id {bad[0]}; uint16"):
                writer.add(bad)
        with pytest.raises(TokenFileError, match="float64; expected integers"):
            writer.add([1.5])
        writer.add([7])
    assert TokenFile(tmp_path / "a")[0].tolist() == [7]


def test_the_fingerprint_changes_with_the_data(tmp_path: Path) -> None:
    saved = TokenFile(write(tmp_path / "a")).fingerprint()
    assert saved == TokenFile(write(tmp_path / "b")).fingerprint()
    for other in ([[3, 1, 4], [2]], [*DOCUMENTS[:4], [3, 6]], [[3, 1], [4], *DOCUMENTS[2:]]):
        assert TokenFile(write(tmp_path / "c", other)).fingerprint() != saved


def test_the_fingerprint_sees_the_first_and_last_bytes_of_a_large_file(tmp_path: Path) -> None:
    write(tmp_path / "a", [list(range(1000))])
    saved = TokenFile(tmp_path / "a").fingerprint(blocks=3, block_bytes=16)
    raw = bin_path(tmp_path / "a").read_bytes()
    for at in (0, len(raw) // 2, len(raw) - 1):
        changed = bytearray(raw)
        changed[at] ^= 1
        bin_path(tmp_path / "a").write_bytes(changed)
        assert TokenFile(tmp_path / "a").fingerprint(blocks=3, block_bytes=16) != saved


def test_the_type_is_the_one_other_tools_choose() -> None:
    assert [dtype_for(v).name for v in (257, 65499, 65500, 10**6)] == [
        *("uint16", "uint16", "int32", "int32")
    ]
