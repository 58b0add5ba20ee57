"""The work of a conversion: files written one block at a time, shared out over the ranks.

All ranks see one folder: `plan.json`, the new files in `files/`, and a marker in `done/` for each
that is whole and on the disk. A file with a marker is never made again, so a job that was killed
goes on where it was. The bytes depend on the plan alone, neither on the number of ranks nor on
restarts. At the end `files/` gets the name of the result and the rest goes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megarlx.checkpoint.files import replace_text, sync_folder, write_safetensors_in_parts
from megarlx.checkpoint.manifest import SavedFile
from megarlx.comm.share import Share
from megarlx.hf.errors import ConversionError
from megarlx.hf.plan import PlannedBlock, PlannedFile
from megarlx.hf.progress import ByteProgress
from megarlx.hf.sources import TensorSource, parts

PLAN, FILES, DONE, PARTIAL = "plan.json", "files", "done", ".partial"
SECONDS_BETWEEN_LOOKS = 0.1


@dataclass(frozen=True)
class Conversion:
    """What is read, what becomes of it, and the folder that it is made in."""

    source: TensorSource
    files: list[PlannedFile]
    folder: Path
    origin: dict[str, Any]  # what else decides about the result, as JSON

    @property
    def made(self) -> Path:
        """Where the new files are until the end."""
        return self.folder / FILES

    @property
    def description(self) -> dict[str, Any]:
        plan = [
            [f.name, b.tensor, b.start, b.entry.name, b.entry.shape, str(b.entry.dtype)]
            for f in self.files
            for b in f.blocks
        ]
        text = json.dumps(plan).encode()
        return {**self.origin, "plan": hashlib.sha256(text).hexdigest()}

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def begin(job: Conversion, fresh: bool) -> None:
    """On rank 0, before any rank works: takes over what an earlier run left, if it was this job."""
    plan = job.folder / PLAN
    if fresh and job.folder.exists():
        shutil.rmtree(job.folder)
    if plan.exists():
        try:
            before = json.loads(plan.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConversionError(f"{plan} is damaged ({error}); --fresh begins anew") from None
        if before != json.loads(json.dumps(job.description)):
            keys = {*before, *job.description}
            changed = sorted(k for k in keys if before.get(k) != job.description.get(k))
            raise ConversionError(
                f"{job.folder} holds parts of another conversion, with another "
                f"{', '.join(changed)}. Repeat that one, or begin anew with --fresh"
            )
    elif job.folder.exists() and any(job.folder.iterdir()):
        raise ConversionError(f"{job.folder} was not made here; --fresh throws it away")
    for name in (DONE, FILES):
        (job.folder / name).mkdir(parents=True, exist_ok=True)
    for left in job.made.glob(f"*{PARTIAL}"):
        left.unlink()
    replace_text(plan, json.dumps(job.description, indent=1) + "\n")


def to_do(job: Conversion, share: Share) -> list[PlannedFile]:
    """This rank's files that no earlier run has made."""
    mine = job.files[share.rank :: share.ranks]
    return [file for file in mine if not _marker(job, file).exists()]


def work(
    job: Conversion, todo: list[PlannedFile], share: Share, files_at_once: int, show: bool
) -> list[SavedFile]:
    """Writes this rank's files; on rank 0 waits for all others and returns every file's digest."""
    written = {file.name: 0 for file in todo}  # of files under way here

    def write(file: PlannedFile) -> None:
        def count(size: int) -> None:
            written[file.name] += size

        _write(job, file, count)

    with ThreadPoolExecutor(files_at_once) as threads:
        futures = [threads.submit(write, file) for file in todo]
        if not share.is_first:
            _finish(futures)
            return []
        with ByteProgress("converting", job.bytes, show) as progress:
            while True:
                done, open_ = wait(futures, SECONDS_BETWEEN_LOOKS, FIRST_EXCEPTION)
                if any(future.exception() for future in done):
                    _finish(futures)
                finished = [file for file in job.files if _marker(job, file).exists()]
                names = {file.name for file in finished}
                under_way = sum(size for name, size in written.items() if name not in names)
                progress.update(sum(file.bytes for file in finished) + under_way)
                if len(finished) == len(job.files):
                    break
                if not open_:
                    time.sleep(SECONDS_BETWEEN_LOOKS)  # the other ranks are still at it
    return [_saved(job, file) for file in job.files]


def _finish(futures: list[Future[None]]) -> None:
    """Raises the first error; what has not begun is not begun any more."""
    try:
        for future in futures:
            if not future.cancelled():
                future.result()
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def _marker(job: Conversion, file: PlannedFile) -> Path:
    return job.folder / DONE / f"{file.name}.json"


def _write(job: Conversion, file: PlannedFile, count: Callable[[int], None]) -> None:
    partial = job.made / f"{file.name}{PARTIAL}"
    values = (_values(job.source, block, count) for block in file.blocks)
    # Few pieces wait for their digest: memory stays small however fast the disk is.
    saved = write_safetensors_in_parts(
        partial, [block.entry for block in file.blocks], values, waiting_pieces=8
    )
    partial.rename(job.made / file.name)
    sync_folder(job.made)
    marker = {"bytes": saved.bytes, "sha256": saved.sha256}
    replace_text(_marker(job, file), json.dumps(marker))


def _values(
    source: TensorSource, block: PlannedBlock, count: Callable[[int], None]
) -> Iterator[Tensor]:
    for start, size in parts(block.entry.shape, block.start, block.entry.shape):
        values = source.read(block.tensor, start, size).to(block.entry.dtype)
        yield values
        count(values.nbytes)


def _saved(job: Conversion, file: PlannedFile) -> SavedFile:
    marker = json.loads(_marker(job, file).read_text(encoding="utf-8"))
    size = (job.made / file.name).stat().st_size
    if size != marker["bytes"]:
        _marker(job, file).unlink()
        raise ConversionError(
            f"{job.made / file.name} has {size} bytes; {marker['bytes']} were written. Run again "
            "to make it anew"
        )
    return SavedFile(file.name, marker["bytes"], marker["sha256"])
