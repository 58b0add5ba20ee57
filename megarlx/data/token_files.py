"""Token files: Megatron's pair of PREFIX.bin (token ids) and PREFIX.idx (where documents lie).

An .idx holds, little-endian: 9 bytes magic, u64 version (1), u8 dtype code, u64 sequences,
u64 documents + 1, i32 lengths [sequences], i64 byte offsets [sequences], i64 document starts
[documents + 1] (in sequences, the last one is the number of sequences), and at times one byte of
mode a sequence (multimodal data; not read here).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import secrets
import struct
from array import array
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megarlx.naming import naming

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
FLOAT_CODES = {6: "float64", 7: "float32"}  # known to the format, but no token ids
CODES = {dtype: code for code, dtype in DTYPES.items()}
CHECK_AT_ONCE = 1 << 20  # index entries looked at in one go, so that checks need little memory
LONGEST = 2**31 - 1  # lengths are i32

Tokens = npt.NDArray[np.integer]


class TokenFileError(ValueError):
    """A token file that cannot be what it claims to be; says the file, the value, the expected."""


def dtype_for(vocab_size: int) -> np.dtype:
    """The type other tools choose for this vocabulary too: 2 bytes an id wherever they suffice."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


class TokenFile:
    """Read-only view of one pair. Both files are mapped, so opening costs the checks only."""

    def __init__(self, prefix: str | Path, vocab_size: int | None = None) -> None:
        self.prefix = Path(prefix)
        self.vocab_size = vocab_size
        path = idx_path(prefix)
        if not path.exists():
            made = f"of texts it is made by: megarlx prepare {prefix} --tokenizer T --out PREFIX"
            raise TokenFileError(f"{prefix}: there is no {path}; {made}")
        size = path.stat().st_size
        if size < HEADER.size:
            raise TokenFileError(
                f"{path}: has {size} bytes; an index starts with a header of {HEADER.size}"
            )
        self._idx = np.memmap(path, mode="r", dtype=np.uint8)
        magic, version, code, sequences, entries = HEADER.unpack(self._idx[: HEADER.size].tobytes())
        if magic != MAGIC:
            raise TokenFileError(f"{path}: starts with {magic!r}; expected {MAGIC!r}")
        if version != VERSION:
            raise TokenFileError(f"{path}: version is {version}; expected {VERSION}")
        if code not in DTYPES:
            what = f" ({FLOAT_CODES[code]})" if code in FLOAT_CODES else ""
            allowed = ", ".join(f"{c} ({d.name})" for c, d in sorted(DTYPES.items()))
            raise TokenFileError(f"{path}: dtype code is {code}{what}; allowed are {allowed}")
        self.dtype = DTYPES[code]
        without_modes = HEADER.size + 12 * sequences + 8 * entries
        if size not in (without_modes, without_modes + sequences):
            raise TokenFileError(
                f"{path}: has {size} bytes; {sequences} sequences and {entries} document entries "
                f"need {without_modes}"
            )
        self.lengths = self._part(np.dtype("<i4"), sequences, HEADER.size)
        self._offsets = self._part(np.dtype("<i8"), sequences, HEADER.size + 4 * sequences)
        self._starts = self._part(np.dtype("<i8"), entries, HEADER.size + 12 * sequences)
        self.tokens = self._check(path)
        bin_size = bin_path(prefix).stat().st_size
        if bin_size != self.tokens * self.dtype.itemsize:
            state = (
                "is truncated" if bin_size < self.tokens * self.dtype.itemsize else "is too long"
            )
            raise TokenFileError(
                f"{bin_path(prefix)}: {state}: it has {bin_size} bytes; {path.name} describes "
                f"{self.tokens} tokens of {self.dtype.itemsize} bytes = "
                f"{self.tokens * self.dtype.itemsize}"
            )
        # Plain arrays: slicing a np.memmap costs several times as much. `raw` is every token of the
        # .bin, without the check of ids that `span` makes.
        self.raw: Tokens = np.empty(0, self.dtype)
        if self.tokens:
            with open(bin_path(prefix), "rb") as stream:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            # Samples are read in a shuffled order: reading ahead would fetch what nobody wants.
            mapped.madvise(mmap.MADV_RANDOM)
            self.raw = np.frombuffer(mapped, self.dtype)

    def _part(self, dtype: np.dtype, count: int, offset: int) -> np.ndarray:
        return np.frombuffer(self._idx, dtype=dtype, count=count, offset=offset)

    def _check(self, path: Path) -> int:
        """The number of tokens, once lengths, offsets and document starts are seen to agree.

        Every writer lays the sequences one after the other; samples that span several documents
        rely on it, so anything else is refused here instead of being read wrongly later.
        """
        item, expected = self.dtype.itemsize, 0
        for first in range(0, len(self.lengths), CHECK_AT_ONCE):
            lengths = self.lengths[first : first + CHECK_AT_ONCE].astype(np.int64)
            offsets = self._offsets[first : first + CHECK_AT_ONCE]
            if (bad := np.flatnonzero(lengths < 0)).size:
                at = int(bad[0])
                raise TokenFileError(
                    f"{path}: sequence {first + at} has length {lengths[at]}; expected at least 0"
                )
            ends = expected + np.cumsum(lengths) * item
            wanted = ends - lengths * item
            if (bad := np.flatnonzero(offsets != wanted)).size:
                at = int(bad[0])
                raise TokenFileError(
                    f"{path}: sequence {first + at} lies at byte {offsets[at]} of the .bin; "
                    f"expected {wanted[at]}, right after the one before"
                )
            expected = int(ends[-1])
        starts = self._starts
        if len(starts) == 0 or starts[0] != 0 or starts[-1] != len(self.lengths):
            shown = f"from {starts[0]} to {starts[-1]}" if len(starts) else "empty"
            raise TokenFileError(
                f"{path}: document starts go {shown}; expected from 0 to {len(self.lengths)}, "
                "the number of sequences"
            )
        for first in range(0, len(starts) - 1, CHECK_AT_ONCE):
            part = starts[first : first + CHECK_AT_ONCE + 1]
            if (bad := np.flatnonzero(part[1:] < part[:-1])).size:
                at = int(bad[0])
                raise TokenFileError(
                    f"{path}: document {first + at} starts at sequence {part[at]} and ends at "
                    f"{part[at + 1]}; starts must not go down"
                )
        return expected // item

    @property
    def documents(self) -> int:
        return len(self._starts) - 1

    def __len__(self) -> int:
        return self.documents

    def document_bounds(self) -> npt.NDArray[np.int64]:
        """Token positions [documents + 1] at which documents start, and where the last one ends."""
        ends = np.zeros(len(self.lengths) + 1, np.int64)
        np.cumsum(self.lengths, out=ends[1:])
        return ends[self._starts]

    def document_lengths(self) -> npt.NDArray[np.int32]:
        if self.documents == len(self.lengths) and np.array_equal(
            self._starts, np.arange(self.documents + 1)
        ):
            return self.lengths
        lengths = np.diff(self.document_bounds())
        if lengths.max(initial=0) > LONGEST:
            at = int(lengths.argmax())
            raise TokenFileError(
                f"{idx_path(self.prefix)}: document {at} has {lengths[at]} tokens; at most "
                f"{LONGEST} can be used"
            )
        return lengths.astype(np.int32)

    def __getitem__(self, document: int) -> Tokens:
        if not 0 <= document < self.documents:
            raise IndexError(f"{self.prefix}: document {document}; allowed 0 to {len(self) - 1}")
        first, last = int(self._starts[document]), int(self._starts[document + 1])
        if first == last:
            return np.empty(0, self.dtype)
        begin = int(self._offsets[first]) // self.dtype.itemsize
        end = int(self._offsets[last - 1]) // self.dtype.itemsize + int(self.lengths[last - 1])
        return self.span(begin, end)

    def span(self, begin: int, end: int) -> Tokens:
        """Tokens [begin, end) of the .bin, without a copy; ids are checked as they are read."""
        if not 0 <= begin <= end <= self.tokens:
            raise IndexError(f"{self.prefix}: tokens {begin} to {end}; there are {self.tokens}")
        tokens = self.raw[begin:end]
        self.check_ids(tokens, begin)
        return tokens

    def ids_are_valid(self, tokens: Tokens) -> bool:
        if self.vocab_size is None or not tokens.size:
            return True
        signed = self.dtype.kind == "i"
        return bool(tokens.max() < self.vocab_size and not (signed and tokens.min() < 0))

    def check_ids(self, tokens: Tokens, begin: int) -> None:
        if self.vocab_size is not None and not self.ids_are_valid(tokens):
            at = int(np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size))[0])
            raise TokenFileError(
                f"{bin_path(self.prefix)}: token {begin + at} has id {tokens[at]}; the vocabulary "
                f"allows 0 to {self.vocab_size - 1}"
            )

    def fingerprint(self, blocks: int = 64, block_bytes: int = 65536) -> dict[str, int | str]:
        """What a run remembers of its data: both sizes, the digest of the whole .idx, and the
        digest of `blocks` evenly spaced blocks of the .bin, its first and last bytes among them.

        A .bin edited in place between two sampled blocks is not noticed: a digest of terabytes at
        every start would cost more than it protects.
        """
        digest, sampled = hashlib.sha256(self._idx.data), hashlib.sha256()
        raw = self.raw.view(np.uint8)
        last = max(0, raw.size - block_bytes)
        for begin in sorted({last * i // max(1, blocks - 1) for i in range(blocks)}):
            sampled.update(raw[begin : begin + block_bytes].data)
        return {
            "bin_bytes": int(raw.size),
            "idx_bytes": int(self._idx.size),
            "idx_sha256": digest.hexdigest(),
            "bin_sampled_sha256": sampled.hexdigest(),
        }


def check_tokenizer(prefix: str | Path, fingerprint: str) -> None:
    """Refuses token files that PREFIX.json says were made with another tokenizer. Files without
    a PREFIX.json (other tools' files) say nothing and pass."""
    path = Path(f"{prefix}.json")
    if not path.exists():
        return
    made_with = json.loads(path.read_text()).get("tokenizer", {})
    if made_with.get("fingerprint") != fingerprint:
        raise TokenFileError(
            f"{bin_path(prefix)}: made with tokenizer '{made_with.get('name')}' "
            f"({made_with.get('fingerprint')}); the run uses {fingerprint}: prepare --tokenizer RUN"
        )


class TokenFileWriter:
    """Writes one pair, document by document; nobody ever sees a half-written one.

    Both files grow under temporary names. A pair that was there before loses its .idx first, and
    the new .idx comes last: whenever an .idx exists, its .bin is whole.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike, sync: bool = True) -> None:
        """Without `sync` the pair is still never half-written to other processes, but a power cut
        may damage it: for intermediate files that somebody checks against a digest."""
        self.prefix = Path(prefix)
        self._sync = sync
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODES:
            allowed = ", ".join(d.name for d in CODES)
            raise TokenFileError(f"{prefix}: dtype is {self.dtype}; allowed are {allowed}")
        self._limits = np.iinfo(self.dtype)
        self._lengths = array("i")
        self.tokens = 0
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._temporary_bin = temporary_beside(bin_path(prefix))
        self._temporary_idx = temporary_beside(idx_path(prefix))
        self._stream: BinaryIO = open(self._temporary_bin, "wb", buffering=1 << 20)  # noqa: SIM115

    @property
    def documents(self) -> int:
        return len(self._lengths)

    def add(self, tokens: Iterable[int] | Tokens) -> None:
        """Appends one document."""
        wide = np.asarray(tokens if isinstance(tokens, np.ndarray) else list(tokens))
        if wide.size and not np.issubdtype(wide.dtype, np.integer):
            raise TokenFileError(f"{self.prefix}: tokens are {wide.dtype}; expected integers")
        if wide.size and (wide.min() < self._limits.min or wide.max() > self._limits.max):
            worst = wide.max() if wide.max() > self._limits.max else wide.min()
            raise TokenFileError(
                f"{self.prefix}: document {self.documents} holds id {worst}; {self.dtype.name} "
                f"allows {self._limits.min} to {self._limits.max}"
            )
        if wide.size > LONGEST:
            raise TokenFileError(
                f"{self.prefix}: document {self.documents} has {wide.size} tokens; the format "
                f"allows at most {LONGEST}"
            )
        self._stream.write(np.ascontiguousarray(wide, self.dtype).data)
        self._lengths.append(wide.size)
        self.tokens += wide.size

    def append(self, other: TokenFile) -> str:
        """Appends every document of a file of the same type; the digest of the bytes copied."""
        if other.dtype != self.dtype:
            raise TokenFileError(
                f"{other.prefix}: its tokens are {other.dtype.name}; {self.prefix} takes "
                f"{self.dtype.name}"
            )
        digest = hashlib.sha256()
        with open(bin_path(other.prefix), "rb") as stream:
            while block := stream.read(1 << 23):
                digest.update(block)
                self._stream.write(block)
        self._lengths.frombytes(np.ascontiguousarray(other.document_lengths(), np.int32).tobytes())
        self.tokens += other.tokens
        return digest.hexdigest()

    def close(self) -> None:
        self._finish(self._stream)
        with open(self._temporary_idx, "wb") as stream:
            self._write_index(stream)
            self._finish(stream)
        idx_path(self.prefix).unlink(missing_ok=True)
        for temporary, final in (
            (self._temporary_bin, bin_path(self.prefix)),
            (self._temporary_idx, idx_path(self.prefix)),
        ):
            os.replace(temporary, final)
            if self._sync:
                sync_folder(self.prefix.parent)

    def _finish(self, stream: BinaryIO) -> None:
        stream.flush()
        if self._sync:
            os.fsync(stream.fileno())
        stream.close()

    def _write_index(self, stream: BinaryIO) -> None:
        lengths = np.frombuffer(self._lengths, np.int32)
        n = len(lengths)
        stream.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], n, n + 1))
        stream.write(lengths.astype("<i4").data)
        offset = 0
        for first in range(0, n, CHECK_AT_ONCE):
            part = lengths[first : first + CHECK_AT_ONCE].astype(np.int64) * self.dtype.itemsize
            ends = offset + np.cumsum(part)
            stream.write((ends - part).astype("<i8").data)
            offset = int(ends[-1])
        for first in range(0, n + 1, CHECK_AT_ONCE):
            stream.write(np.arange(first, min(first + CHECK_AT_ONCE, n + 1), dtype="<i8").data)

    def discard(self) -> None:
        self._stream.close()
        self._temporary_bin.unlink(missing_ok=True)
        self._temporary_idx.unlink(missing_ok=True)

    def __enter__(self) -> TokenFileWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_beside(path: Path) -> Path:
    """A name that no other process uses, not even one with the same number on another node."""
    return path.with_name(f"{path.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")


def write_atomically(path: Path, text: str, sync: bool = True) -> None:
    """A small text file that is either there whole or not at all (without `sync`: to other
    processes, not after a power cut)."""
    temporary = temporary_beside(path)
    with naming(path), open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        if sync:
            os.fsync(stream.fileno())
    os.replace(temporary, path)
    if sync:
        sync_folder(path.parent)
