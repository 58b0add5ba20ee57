"""A Hugging Face folder where a run is expected: converted once, beside the runs.

    FOLDER/converted/NAME-DIGEST/     the run; FOLDER is that of the new run, or runs/

The digest is of all small files, and of the header, the size and the time of each tensor file: a
folder that has changed since is converted again, under another name.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megarlx.comm import launch
from megarlx.comm.share import Share
from megarlx.hf.command import Asked, Converter
from megarlx.hf.errors import ConversionError
from megarlx.hf.tokenizer_files import KEPT
from megarlx.printable import complain

FOLDER = "converted"
DIGITS = 12  # of the digest, in the name
LONGEST_WAIT_SECONDS = 3600.0  # of other processes for the one that converts
LOOK_EVERY_SECONDS = 0.2


def run_of_model(folder: Path, beside: Path) -> Path:
    """The run that a folder of Hugging Face becomes. One process of a job makes it, the others
    wait; of several jobs one makes it."""
    path = folder.resolve()
    name = re.sub(r"[^A-Za-z0-9._-]", "-", path.name).lstrip(".") or "model"
    run = beside / FOLDER / f"{name}-{digest_of(path)[:DIGITS]}"
    if _is_there(run):
        return run
    if launch.read().rank != 0:
        _wait_for(run)
        return run
    with _alone(run):
        if not _is_there(run):  # another job may have made it while this one waited
            _convert(folder, run)
    return run


def digest_of(folder: Path) -> str:
    found = hashlib.sha256()
    for name in sorted(n for n in KEPT if (folder / n).is_file()):
        found.update(f"{name}\0".encode())
        found.update(hashlib.sha256((folder / name).read_bytes()).digest())
    for path in sorted(folder.glob("*.safetensors*")):
        status = path.stat()
        found.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        found.update(_head(path))
    return found.hexdigest()


def _head(path: Path) -> bytes:
    """The header of a tensor file; whether it is one is seen when it is converted."""
    with open(path, "rb") as stream:
        length = stream.read(8)
        if len(length) < 8 or path.suffix != ".safetensors":
            return length + stream.read()
        return length + stream.read(min(struct.unpack("<Q", length)[0], path.stat().st_size))


def _is_there(run: Path) -> bool:
    """It gets its name when it is whole."""
    return run.is_dir()


def _convert(folder: Path, run: Path) -> None:
    making = run.with_name(f".{run.name}.making")
    complain(f"{folder} is a Hugging Face model; it becomes the run {run}")
    # What was asked for and killed goes on: the folder's digest is in the name.
    asked = Asked("hf", "megarlx", str(folder.resolve()), making, quiet=True)
    if status := Converter(asked, Share()).run():
        raise ConversionError(f"{folder} could not be converted (status {status})")
    os.rename(making, run)


def _wait_for(run: Path) -> None:
    end = time.monotonic() + LONGEST_WAIT_SECONDS
    while not _is_there(run):
        if time.monotonic() > end:
            raise ConversionError(
                f"{run} was not there after {LONGEST_WAIT_SECONDS:.0f} s; rank 0 makes it, in a "
                "folder that all ranks must see"
            )
        time.sleep(LOOK_EVERY_SECONDS)


@contextmanager
def _alone(run: Path) -> Iterator[None]:
    run.parent.mkdir(parents=True, exist_ok=True)
    with open(run.with_name(f".{run.name}.lock"), "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
