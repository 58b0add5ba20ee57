import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarlx.data.documents import BadLineError, InputError, Reading, cut, documents, find_inputs

LINES = Reading("text", "line")
TEXTS = ["alpha", "", "béta\tγ", "x" * 300, "last"]


def read(path: Path, piece_bytes: int = 64, reading: Reading = LINES) -> list[str | BadLineError]:
    [(name, kind)] = find_inputs([str(path)], None)
    return [d for p in cut(name, kind, reading, piece_bytes) for d in documents(p, reading)]


def write(path: Path, raw: bytes) -> Path:
    if path.suffix == ".gz":
        raw = gzip.compress(raw)
    if path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        half = len(raw) // 2  # two frames, as parallel compressors write them
        raw = zstandard.compress(raw[:half]) + zstandard.compress(raw[half:])
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_jsonl_gives_its_texts_in_order(
    tmp_path: Path, suffix: str, ending: str, last: bool
) -> None:
    raw = ending.join(json.dumps({"id": i, "text": t}) for i, t in enumerate(TEXTS))
    assert read(write(tmp_path / f"a{suffix}", (raw + ending * last).encode())) == TEXTS


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.zst"])
def test_text_is_a_document_a_line_or_a_file(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", "\n".join(TEXTS).encode())
    assert read(path) == TEXTS
    assert read(path, reading=Reading("text", "file")) == ["\n".join(TEXTS)]


def test_a_mark_before_the_text_of_a_file_is_no_text(tmp_path: Path) -> None:
    raw = b"\xef\xbb\xbf" + b'{"text": "good"}\r\n' * 2
    assert read(write(tmp_path / "a.jsonl", raw)) == ["good"] * 2
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfgood\r\ngood\r\n")) == ["good"] * 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab é", max_size=9), max_size=12), st.integers(1, 40))
def test_every_line_belongs_to_exactly_one_piece(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], piece_bytes: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.txt"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    assert read(path, piece_bytes) == lines


def test_parquet_gives_a_column_row_group_by_row_group(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    table = pa.table({"id": range(5), "body": ["a", "b", None, "d", "e"]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    found = read(tmp_path / "a.parquet", reading=Reading("body"))
    assert [d for d in found if isinstance(d, str)] == ["a", "b", "d", "e"]
    assert "a.parquet, line 3: 'body' is NoneType; expected a string" in str(found[2])
    with pytest.raises(InputError, match=r"has no column 'text' .its columns: id, body"):
        read(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match=r"b\.parquet: not a Parquet file"):
        read(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": ', "not JSON: Expecting value"),
        (b"[" * 100000, "not JSON: maximum recursion"),
        (b"[1]", "holds a list; expected an object with the key 'text'"),
        (b'{"body": "x", "id": 1}', r"has no key 'text' .its keys: body, id."),
        (b'{"text": 7}', "'text' is int; expected a string"),
        (b'{"text": "\xff"}', "not UTF-8: byte 10 is 0xff"),
        (b'{"text": "a\\ud800"}', "'text' holds half a surrogate pair at 1"),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_reason(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    good = b'{"text": "good"}\n'
    path = write(tmp_path / "a.jsonl", good * 20 + line + b"\n" + good * 3)
    for piece_bytes in (10**9, 100):
        found = read(path, piece_bytes)
        assert found[:20] == ["good"] * 20
        assert found[21:] == ["good"] * 3
        with pytest.raises(BadLineError, match=rf"a\.jsonl, line 21: {reason}"):
            raise found[20] if isinstance(found[20], BadLineError) else AssertionError


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_compressed_file_is_an_error_never_a_short_result(
    tmp_path: Path, suffix: str
) -> None:
    raw = b"".join(b'{"text": "%d"}\n' % (i * i) for i in range(3000))
    path = write(tmp_path / f"a.jsonl{suffix}", raw)
    whole = path.read_bytes()
    for damaged in (whole[:-3], whole[: len(whole) // 2], whole[:3000] + b"zzzz" + whole[3004:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"damaged after line \d+"):
            read(path)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=120) | st.text('{}[]",:text 1\\u\n', max_size=60), st.integers(1, 50))
def test_any_bytes_give_texts_or_named_lines(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes | str, piece_bytes: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    found = read(path, piece_bytes)
    number_of_lines = len(path.read_bytes().split(b"\n")) - path.read_bytes().endswith(b"\n")
    assert len(found) == (number_of_lines if path.read_bytes() else 0)
    for line, item in enumerate(found, start=1):
        if isinstance(item, BadLineError):
            assert f"fuzz.jsonl, line {line}: " in str(item)
        else:
            assert isinstance(item, str)


def test_inputs_are_found_by_name_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.txt.gz", "sub/c.parquet", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found = find_inputs([str(tmp_path)], None)
    assert [(Path(p).name, kind) for p, kind in found] == [
        *(("a.txt.gz", "text"), ("b.jsonl", "jsonl"), ("c.parquet", "parquet"))
    ]
    with pytest.raises(InputError, match="known endings are"):
        find_inputs([str(tmp_path / "notes.md")], None)
    assert find_inputs([str(tmp_path / "notes.md")], "text")[0][1] == "text"
    with pytest.raises(InputError, match="no such file"):
        find_inputs([str(tmp_path / "none")], None)
