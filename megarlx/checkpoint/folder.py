"""The checkpoints folder of a run: `iter_00000100/ …`, `latest`, and names that are under way.

A folder called `iter_…` was whole when it got that name. `latest` holds that name and the digest
of the manifest, and is replaced last.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

from megarlx.checkpoint.errors import CheckpointError
from megarlx.checkpoint.files import replace_text, sync_folder
from megarlx.checkpoint.manifest import Manifest, read_manifest
from megarlx.comm.collectives import gather_values
from megarlx.comm.groups import Group

LATEST = "latest"
SAVING, REPLACED, DELETING = ".saving-", ".replaced-", ".deleting-"
_NAME = re.compile(r"iter_(\d{8,18})")
_LATEST = re.compile(r"(iter_\d{8,18}) ([0-9a-f]{64})\n")


def checkpoint_name(iteration: int) -> str:
    return f"iter_{iteration:08d}"


def iterations(folder: Path) -> list[int]:
    """Of everything in the folder that is called a checkpoint, in order."""
    if not folder.is_dir():
        return []
    found = (_NAME.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def check_sizes(checkpoint: Path, manifest: Manifest) -> None:
    for file in manifest.files:
        path = checkpoint / file.name
        try:
            size = path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        if size != file.bytes:
            raise CheckpointError(f"{path} has {size} bytes; its manifest says {file.bytes}")


def complete(checkpoint: Path) -> Manifest:
    """Checks all but the digests of the tensor files, which `load` and `verify` do."""
    manifest = read_manifest(checkpoint)
    expected = checkpoint_name(manifest.iteration)
    if checkpoint.name != expected:
        raise CheckpointError(
            f"{checkpoint} holds iteration {manifest.iteration}; it should be called {expected}"
        )
    check_sizes(checkpoint, manifest)
    return manifest


def latest(folder: Path, world: Group | None = None, *, read_only: bool = False) -> Path | None:
    """The checkpoint to go on from: what `latest` names, else, with a warning, the newest complete.

    None where there is no checkpoint at all; where there are some but none is complete, an error.
    With `world`, its first rank looks and all ranks get the same answer. `read_only` mends nothing
    in the folder, which may be another run's.
    """
    name, problem = None, None
    if world is None or world.is_first:
        try:
            name = _latest(folder, read_only)
        except (CheckpointError, OSError) as error:
            problem = str(error)
    if world is not None:
        name, problem = gather_values([name, problem], world)[0]
    if problem is not None:
        raise CheckpointError(problem)
    return None if name is None else folder / name


def _latest(folder: Path, read_only: bool) -> str | None:
    problems: list[str] = []
    try:
        named = _named_by_latest(folder)
        if named is not None:
            return named
        if not iterations(folder):
            return None
        problems.append(f"{folder / LATEST} is missing")
    except CheckpointError as error:
        problems.append(str(error))
    if not read_only:
        recover(folder)
    for iteration in reversed(iterations(folder)):
        name = checkpoint_name(iteration)
        try:
            complete(folder / name)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        warnings.warn(f"{_each_once(problems)}. Going on from {folder / name}", stacklevel=3)
        return name
    raise CheckpointError(f"{folder} holds no complete checkpoint: {_each_once(problems)}")


def _each_once(problems: list[str]) -> str:
    return "; ".join(dict.fromkeys(problems))  # `latest` names what is then found again


def _named_by_latest(folder: Path) -> str | None:
    path = folder / LATEST
    try:
        text = path.read_bytes().decode("ascii", "replace")
    except FileNotFoundError:
        return None
    match = _LATEST.fullmatch(text)
    if not match:
        raise CheckpointError(f"{path} holds {text[:80]!r}; expected a checkpoint and its digest")
    manifest = complete(folder / match[1])
    if manifest.digest != match[2]:
        raise CheckpointError(
            f"{folder / match[1]} has the digest {manifest.digest}; {path} says {match[2]}"
        )
    return match[1]


def commit(saved: Path, folder: Path, iteration: int) -> Path:
    """Gives a finished folder its name. What had that name goes only when the new one is there."""
    target = folder / checkpoint_name(iteration)
    replaced = folder / f"{REPLACED}{target.name}"
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(target, replaced)
    os.rename(saved, target)
    sync_folder(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def recover(folder: Path) -> None:
    """Undoes the first half of a replacement whose process was killed before the second."""
    for entry in folder.iterdir():
        target = folder / entry.name.removeprefix(REPLACED)
        if entry.name.startswith(REPLACED) and not target.exists():
            os.rename(entry, target)


def point_latest_at(checkpoint: Path, digest: str) -> None:
    replace_text(checkpoint.parent / LATEST, f"{checkpoint.name} {digest}\n")


def delete(checkpoint: Path) -> None:
    """Under another name first: a half-deleted folder must not look like a checkpoint."""
    going = checkpoint.with_name(f"{DELETING}{checkpoint.name}")
    shutil.rmtree(going, ignore_errors=True)
    os.rename(checkpoint, going)
    shutil.rmtree(going)


def leftovers(folder: Path) -> Iterator[Path]:
    """Of processes that were killed while they saved or deleted."""
    for entry in folder.iterdir():
        if entry.name.startswith((SAVING, REPLACED, DELETING)):
            yield entry
