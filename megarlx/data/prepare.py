"""Documents into token files: many processes, the same bytes whatever their number, resumable.

The inputs are cut into pieces (documents.py). Each piece becomes a small token file of its own in
PREFIX.pieces/, with a marker that says it is finished and what it must contain; rank 0 then joins
them in order. A piece that is finished is never made again, so a killed run goes on where it was.
Ranks share nothing but that folder.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.synchronize import Lock
from pathlib import Path
from typing import Any, Literal

from megarlx.comm.share import Share
from megarlx.data.documents import (
    BadLineError,
    Format,
    InputError,
    Piece,
    Reading,
    cut,
    documents,
    find_inputs,
)
from megarlx.data.prepare_progress import Progress
from megarlx.data.token_files import (
    TokenFile,
    TokenFileError,
    TokenFileWriter,
    bin_path,
    dtype_for,
    idx_path,
    write_atomically,
)
from megarlx.data.tokenizer import Tokenizer, TokenizerError, load_tokenizer

DOCUMENTS_AT_ONCE = 256  # encoded in one call
EXAMPLES_KEPT = 10  # bad lines quoted in the report, of each piece and in all


@dataclass(frozen=True)
class Settings:
    inputs: tuple[str, ...]
    tokenizer: str
    out: str
    eos: str | None = None
    format: Format | None = None  # absent: by the names of the inputs
    reading: Reading = field(default_factory=Reading)
    on_bad_line: Literal["stop", "skip"] = "stop"
    piece_bytes: int = 32 << 20
    processes: int = 1  # on this rank
    fresh: bool = False  # throw away what an earlier run with other settings left


class PrepareError(ValueError):
    """Settings and what lies on the disk do not go together."""


def prepare(
    settings: Settings, share: Share | None = None, show: bool = True
) -> dict[str, Any] | None:
    """Makes OUT.bin, OUT.idx and OUT.json. Rank 0 gets the report that OUT.json holds; the others
    get None as soon as their own pieces are done."""
    share = share or Share()
    if settings.piece_bytes < 1 or settings.processes < 1:
        raise PrepareError(
            f"piece_bytes is {settings.piece_bytes}, processes {settings.processes}; "
            "allowed are at least 1"
        )
    tokenizer = load_tokenizer(settings.tokenizer, settings.eos)
    inputs = find_inputs(list(settings.inputs), settings.format)
    pieces = [
        piece
        for path, kind in inputs
        for piece in cut(path, kind, settings.reading, settings.piece_bytes)
    ]
    plan = _plan(settings, tokenizer, [path for path, _ in inputs], len(pieces))
    report = _take_over(settings, plan) if share.is_first else None
    share.meet()  # nobody works before rank 0 has looked at what was there
    if not share.is_first:
        if not _report_path(settings).exists():
            _work(settings, pieces, share, None)
        return None
    if report is not None:
        return report
    with Progress(pieces, _folder(settings), show) as progress:
        _work(settings, pieces, share, progress.update)
        progress.wait_for_the_others()
    return _join(settings, plan, tokenizer, len(pieces))


def _folder(settings: Settings) -> Path:
    return Path(f"{settings.out}.pieces")


def _report_path(settings: Settings) -> Path:
    return Path(f"{settings.out}.json")


def _plan(
    settings: Settings, tokenizer: Tokenizer, paths: list[str], pieces: int
) -> dict[str, Any]:
    """Everything that decides about the bytes of the result, and nothing else."""
    found = {path: os.stat(path) for path in paths}
    return {
        "version": 1,
        "tokenizer": tokenizer.fingerprint,
        "reading": asdict(settings.reading),
        "on_bad_line": settings.on_bad_line,
        "pieces": pieces,
        "piece_bytes": settings.piece_bytes,
        "inputs": {path: [status.st_size, status.st_mtime_ns] for path, status in found.items()},
    }


def _digest(plan: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def _take_over(settings: Settings, plan: dict[str, Any]) -> dict[str, Any] | None:
    """Looks at what an earlier run left: its report if it was this very job and is complete."""
    folder, report = _folder(settings), _report_path(settings)
    if settings.fresh:
        for path in (report, idx_path(settings.out), bin_path(settings.out)):
            path.unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
    if report.exists():
        found = json.loads(report.read_text())
        if found.get("plan") == _digest(plan):
            return found
        other = found.get("tokenizer", {}).get("fingerprint") != plan["tokenizer"]
        what = "with another tokenizer" if other else "from other inputs or settings"
        raise PrepareError(
            f"{report} describes token files made {what}. "
            "Choose another output, or --fresh to make them anew."
        )
    plan_path = folder / "plan.json"
    if plan_path.exists():
        before = json.loads(plan_path.read_text())
        if before.get("on_bad_line") == "stop":  # what was finished has no bad line
            before["on_bad_line"] = settings.on_bad_line
        changed = [k for k in sorted({*plan, *before}) if plan.get(k) != before.get(k)]
        if changed and not any(folder.glob("[0-9]*.json")):
            shutil.rmtree(folder)  # nothing was finished that could be kept
        elif changed:
            what = "; ".join(_told(k, before.get(k), plan.get(k)) for k in changed)
            raise PrepareError(
                f"{folder} holds pieces of another job: {what}. Repeat that one, or --fresh, which "
                "throws them away."
            )
    elif idx_path(settings.out).exists():
        raise PrepareError(
            f"{idx_path(settings.out)} exists and was not made here. "
            "Choose another output, or --fresh to replace it."
        )
    folder.mkdir(parents=True, exist_ok=True)
    # What a run that was killed while joining or while writing a piece had under its hands.
    for left in (
        *folder.glob("*.partial-*"),
        *folder.parent.glob(f"{Path(settings.out).name}.*.partial-*"),
    ):
        left.unlink()
    write_atomically(plan_path, json.dumps(plan, indent=1))
    return None


def _told(key: str, before: Any, now: Any) -> str:
    if key != "inputs":
        return f"{key} was {before}, is {now}"
    changed = [path for path in sorted({*before, *now}) if before.get(path) != now.get(path)]
    return f"{', '.join(changed)}: not as they were"


def marker_path(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.json"


def _piece_prefix(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}"


def _work(
    settings: Settings,
    pieces: list[Piece],
    share: Share,
    progress: Callable[[], None] | None,
) -> None:
    """Makes this rank's pieces that are not finished, the largest first."""
    folder = _folder(settings)
    mine = range(share.rank, len(pieces), share.ranks)
    todo = [n for n in mine if not marker_path(folder, n).exists()]
    todo.sort(key=lambda n: (-pieces[n].input_bytes, n))
    count = min(settings.processes, len(todo))
    if count <= 1:
        tokenizer = load_tokenizer(settings.tokenizer, settings.eos)
        for number in todo:
            make_piece(settings, tokenizer, pieces[number], number)
            if progress:
                progress()
        return
    context = multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    position, lock = context.Value("q", 0, lock=False), context.Lock()
    arguments = (settings, [(n, pieces[n]) for n in todo], position, lock, errors, os.getpid())
    workers = [context.Process(target=_worker, args=arguments, daemon=True) for _ in range(count)]

    def check() -> None:
        if not errors.empty():
            raise errors.get()
        if dead := [w.exitcode for w in workers if w.exitcode]:
            raise PrepareError(f"a worker process ended with exit status {dead[0]}")

    for worker in workers:
        worker.start()
    try:
        while any(worker.is_alive() for worker in workers):
            check()
            if progress:
                progress()
            time.sleep(0.05)
        check()
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _worker(
    settings: Settings,
    todo: list[tuple[int, Piece]],
    position: Any,
    lock: Lock,
    errors: Any,
    parent: int,
) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    try:
        tokenizer = load_tokenizer(settings.tokenizer, settings.eos)
        while True:
            with lock:
                at = position.value
                position.value = at + 1
            if at >= len(todo):
                return
            number, piece = todo[at]
            make_piece(settings, tokenizer, piece, number, parent)
    except (ValueError, OSError) as error:
        # Errors of this package carry arguments of their own and do not travel: their text does.
        errors.put(PrepareError(str(error)))


def make_piece(
    settings: Settings, tokenizer: Tokenizer, piece: Piece, number: int, parent: int | None = None
) -> None:
    """One piece: its token file, then the marker that vouches for it."""
    prefix = _piece_prefix(_folder(settings), number)
    empty, bad, examples = 0, 0, []
    with TokenFileWriter(prefix, dtype_for(tokenizer.vocab_size), sync=False) as writer:
        for batch in _batches(documents(piece, settings.reading), DOCUMENTS_AT_ONCE):
            if parent is not None and os.getppid() != parent:
                raise PrepareError("the process that started this worker is gone")
            texts = []
            for found in batch:
                if isinstance(found, BadLineError):
                    if settings.on_bad_line == "stop":
                        raise found
                    bad += 1
                    examples.append(str(found))
                elif found.strip():
                    texts.append(found)
                else:
                    empty += 1
            for ids in _encode(tokenizer, texts, piece):
                writer.add([*tokenizer.begun(ids), tokenizer.eos_id])
            del examples[EXAMPLES_KEPT:]
    marker = {
        "documents": writer.documents,
        "tokens": writer.tokens,
        "empty_documents": empty,
        "bad_lines": bad,
        "bad_examples": examples,
        "input_bytes": piece.input_bytes,
        "bin_sha256": _sha256(bin_path(prefix)),
        "idx_sha256": _sha256(idx_path(prefix)),
    }
    write_atomically(marker_path(_folder(settings), number), json.dumps(marker), sync=False)


def _encode(tokenizer: Tokenizer, texts: list[str], piece: Piece) -> list[list[int]]:
    try:
        return tokenizer.encode_batch(texts)
    except TokenizerError as error:
        raise TokenizerError(f"{piece.path}: {error}") from error


def _batches(found: Iterator[str | BadLineError], size: int) -> Iterator[list[str | BadLineError]]:
    batch = []
    for item in found:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _join(
    settings: Settings, plan: dict[str, Any], tokenizer: Tokenizer, pieces: int
) -> dict[str, Any]:
    """The pieces in order into one pair; each must be what its marker says."""
    folder = _folder(settings)
    totals = {"documents": 0, "tokens": 0, "empty_documents": 0, "bad_lines": 0}
    examples: list[str] = []
    with TokenFileWriter(settings.out, dtype_for(tokenizer.vocab_size)) as writer:
        for number in range(pieces):
            prefix, path = _piece_prefix(folder, number), marker_path(folder, number)
            marker = json.loads(path.read_text())
            try:
                whole = _sha256(idx_path(prefix)) == marker["idx_sha256"]
                whole = whole and writer.append(TokenFile(prefix)) == marker["bin_sha256"]
            except (TokenFileError, FileNotFoundError) as error:
                path.unlink()
                raise PrepareError(
                    f"piece {number}: {error}. Run again to make it anew."
                ) from error
            if not whole:
                path.unlink()
                raise PrepareError(
                    f"{prefix}: its bytes are not those its marker describes: it was damaged after "
                    "it was written. Run again to make it anew."
                )
            for key in totals:
                totals[key] += marker[key]
            examples += marker["bad_examples"]
        if writer.documents == 0:
            raise InputError(f"no document in {', '.join(settings.inputs)}")
    report = {
        "plan": _digest(plan),
        **totals,
        "bad_examples": examples[:EXAMPLES_KEPT],
        "tokenizer": {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
        },
        "inputs": [{"path": path, "bytes": size} for path, (size, _) in plan["inputs"].items()],
    }
    write_atomically(_report_path(settings), json.dumps(report, indent=1) + "\n")
    shutil.rmtree(folder)
    return report
