"""Whether the files of a checkpoint are those that were saved."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megarlx.checkpoint.errors import CheckpointError
from megarlx.checkpoint.files import sha256_of
from megarlx.checkpoint.folder import check_sizes
from megarlx.checkpoint.manifest import Manifest, SavedFile, read_manifest

THREADS = 4  # files that are read at the same time


def _problem(path: Path, file: SavedFile) -> str | None:
    try:
        found = sha256_of(path)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if found == file.sha256:
        return None
    return f"{path} is damaged: its SHA-256 is {found}; its manifest says {file.sha256}"


def check_digests(checkpoint: Path, files: Iterable[SavedFile]) -> None:
    """Reads the files whole; all that are damaged are named."""
    with ThreadPoolExecutor(THREADS) as threads:
        found = threads.map(lambda file: _problem(checkpoint / file.name, file), files)
        problems = [problem for problem in found if problem]
    if problems:
        raise CheckpointError("\n".join(problems))


def verify(checkpoint: Path) -> Manifest:
    """Checks every byte of a checkpoint and returns its manifest."""
    manifest = read_manifest(checkpoint)
    check_sizes(checkpoint, manifest)
    check_digests(checkpoint, manifest.files)
    return manifest
