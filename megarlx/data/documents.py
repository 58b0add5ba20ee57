"""Documents out of JSONL, text and Parquet files, plain or compressed, piece by piece.

Inputs are cut into pieces that depend on the inputs alone, never on how many processes share them:
byte ranges of plain line files, row groups of Parquet, whole files where no cut is possible.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

Format = Literal["jsonl", "text", "parquet"]
FORMATS: tuple[Format, ...] = ("jsonl", "text", "parquet")
SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".parquet": "parquet",
}
COMPRESSIONS = (".gz", ".zst")
LONGEST = 1 << 27  # bytes of a document: a small compressed file may hold one that fills the memory
FED = 1 << 12  # compressed bytes at a time: zstd makes at most 32,768 times as many out of them


class InputError(ValueError):
    """An input that cannot be read at all."""


class BadLineError(ValueError):
    """A line (or a Parquet row) that is no document: which, and why."""

    def __init__(self, path: str, line: int, reason: str) -> None:
        super().__init__(f"{path}, line {line}: {reason}")


@dataclass(frozen=True)
class Piece:
    """A part of one input. Lines belong to the piece in which their first byte lies."""

    path: str
    format: Format
    begin: int  # byte, or row group of a Parquet file
    end: int
    input_bytes: int  # what reading it costs, for progress


@dataclass(frozen=True)
class Reading:
    """How documents are found in the inputs."""

    key: str = "text"  # field of a JSON object, column of a Parquet file
    text_unit: Literal["line", "file"] = "line"  # what one document is in a text file


def format_of(path: Path) -> Format | None:
    suffix = path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix
    return SUFFIXES.get(suffix)


def find_inputs(inputs: list[str], asked: Format | None) -> list[tuple[str, Format]]:
    """Every input file and its format; a folder stands for all files in it of a known name."""
    found: list[tuple[str, Format]] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and format_of(p))
            if not inside:
                raise InputError(f"{name}: no file in this folder ends in {', '.join(SUFFIXES)}")
            found += [(str(p), asked or format_of(p) or "text") for p in inside]
            continue
        if not path.is_file():
            raise InputError(f"{name}: no such file")
        kind = asked or format_of(path)
        if kind is None:
            raise InputError(
                f"{name}: its name does not say what it is; known endings are "
                f"{', '.join(SUFFIXES)}, each also with {' or '.join(COMPRESSIONS)}; or name the "
                f"format ({', '.join(FORMATS)})"
            )
        found.append((name, kind))
    return found


def cut(path: str, kind: Format, reading: Reading, piece_bytes: int) -> list[Piece]:
    size = Path(path).stat().st_size
    if kind == "parquet":
        metadata = _parquet(path).metadata
        sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
        return [Piece(path, kind, i, i + 1, size) for i, size in enumerate(sizes)]
    whole = Path(path).suffix in COMPRESSIONS or (kind == "text" and reading.text_unit == "file")
    if whole:
        return [Piece(path, kind, 0, size, size)]
    starts = range(0, size, piece_bytes)
    ends = [min(start + piece_bytes, size) for start in starts]
    return [Piece(path, kind, a, b, b - a) for a, b in zip(starts, ends, strict=True)]


def documents(piece: Piece, reading: Reading) -> Iterator[str | BadLineError]:
    """The documents of a piece in order; what is none comes as the error that says why."""
    if piece.format == "parquet":
        yield from _rows(piece, reading.key)
        return
    compressed = Path(piece.path).suffix in COMPRESSIONS
    # gzip and zstd fail in the middle of a stream; which line it was helps to find the place.
    number = 0
    with open_input(piece.path) as stream:
        try:
            if piece.format == "text" and reading.text_unit == "file":
                yield _text(_within(stream.read(LONGEST + 1), piece.path, 1), piece.path, 1)
                return
            for start, line in _lines(stream, piece, compressed):
                _within(line, piece.path, number + 1)
                number += 1
                found = _document(line, piece, number, reading.key)
                if isinstance(found, BadLineError) and piece.begin:
                    at = _newlines_before(piece.path, start) + 1
                    found = _document(line, piece, at, reading.key)
                yield found
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(f"{piece.path}: damaged after line {number}: {error}") from error


def _lines(stream: BinaryIO, piece: Piece, compressed: bool) -> Iterator[tuple[int, bytes]]:
    if compressed:
        while line := stream.readline(LONGEST + 1):
            yield 0, line
        return
    if piece.begin:
        stream.seek(piece.begin - 1)
        # the rest of a line that began in an earlier piece
        while (rest := stream.readline(LONGEST)) and not rest.endswith(b"\n"):
            pass
    start = stream.tell()
    while start < piece.end and (line := stream.readline(LONGEST + 1)):
        yield start, line
        start += len(line)


def lines(path: str) -> Iterator[bytes]:
    """The lines of a file, plain or compressed."""
    with open_input(path) as stream:
        for number in itertools.count(1):
            if not (line := stream.readline(LONGEST + 1)):
                return
            yield _within(line, path, number)


def _within(text: bytes, path: str, number: int) -> bytes:
    if len(text) > LONGEST:
        raise InputError(f"{path}, line {number}: is longer than {LONGEST:,} bytes")
    return text


def _document(line: bytes, piece: Piece, number: int, key: str) -> str | BadLineError:
    line = line.rstrip(b"\r\n")
    text = _text(line, piece.path, number)
    if piece.format == "text" or isinstance(text, BadLineError) or not text.strip():
        return text

    def bad(reason: str) -> BadLineError:
        return BadLineError(piece.path, number, reason)

    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return bad(f"not JSON: {error}")
    if not isinstance(value, dict):
        return bad(f"holds a {type(value).__name__}; expected an object with the key '{key}'")
    if key not in value:
        keys = ", ".join(list(value)[:10]) or "none"
        return bad(f"has no key '{key}' (its keys: {keys}); --key names the one to take")
    return _checked(value[key], f"'{key}'", piece.path, number)


def _text(raw: bytes, path: str, number: int) -> str | BadLineError:
    try:
        return raw.decode("utf-8-sig")  # editors of Windows put a mark before a file's text
    except UnicodeDecodeError as error:
        return BadLineError(path, number, f"not UTF-8: byte {error.start} is {raw[error.start]:#x}")


def _checked(value: object, what: str, path: str, number: int) -> str | BadLineError:
    if not isinstance(value, str):
        return BadLineError(path, number, f"{what} is {type(value).__name__}; expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return BadLineError(path, number, f"{what} holds half a surrogate pair at {error.start}")
    return value


def _newlines_before(path: str, end: int) -> int:
    count = 0
    with open(path, "rb") as stream:
        while end > 0 and (block := stream.read(min(end, 1 << 20))):
            count += block.count(b"\n")
            end -= len(block)
    return count


def _rows(piece: Piece, key: str) -> Iterator[str | BadLineError]:
    file = _parquet(piece.path)
    if key not in file.schema_arrow.names:
        columns = ", ".join(file.schema_arrow.names)
        raise InputError(f"{piece.path}: has no column '{key}' (its columns: {columns})")
    before = sum(file.metadata.row_group(i).num_rows for i in range(piece.begin))
    column = file.read_row_group(piece.begin, columns=[key])[key]
    for row, value in enumerate(column):
        yield _checked(value.as_py(), f"'{key}'", piece.path, before + row + 1)


def _parquet(path: str) -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise InputError(
            f"{path}: Parquet needs pyarrow. Install it: pip install pyarrow"
        ) from error
    import pyarrow

    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a Parquet file: {error}") from error


def open_input(path: str) -> BinaryIO:
    if path.endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.endswith(".zst"):
        return io.BufferedReader(_ZstdStream(path), 1 << 20)
    return open(path, "rb", buffering=1 << 20)


class _ZstdStream(io.RawIOBase):
    """Decompresses frame after frame, and notices (as zstandard's own reader does not) when the
    file ends inside one."""

    def __init__(self, path: str) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise InputError(
                f"{path}: needs zstandard. Install it: pip install zstandard"
            ) from error
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._error = zstandard.ZstdError
        self._file = open(path, "rb")  # noqa: SIM115
        self._frame = self._new_frame()
        self._inside = False
        self._waiting = b""  # compressed, not yet looked at
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            block = self._waiting or self._file.read(FED)
            self._waiting = b""
            if not block:
                if self._inside:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            self._inside = True
            try:
                self._ready = self._frame.decompress(block)
            except self._error as error:
                raise EOFError(f"zstd: {error}") from error
            if self._frame.eof:
                self._waiting = self._frame.unused_data
                self._frame, self._inside = self._new_frame(), False
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
