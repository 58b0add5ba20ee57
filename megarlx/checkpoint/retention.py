"""Which checkpoints stay, and the references that keep a parent alive for its excursions."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megarlx.checkpoint.errors import CheckpointError
from megarlx.checkpoint.files import sync_folder, write_new
from megarlx.checkpoint.folder import checkpoint_name, complete, delete, iterations

REFERENCES = "references"
_REFERENCE = re.compile(r"iter_(\d{8,18})\.[0-9a-f]{16}\.json")


def _nothing(iteration: int) -> bool:
    return False


@dataclass(frozen=True)
class Retention:
    """Every rule keeps; what no rule keeps is deleted. The default keeps everything."""

    last: int | None = None  # this many newest; None: all
    every: int | None = None  # iterations that are multiples of it
    listed: frozenset[int] = frozenset()
    protected: Callable[[int], bool] = _nothing  # said by the caller, asked at each clean-up

    def __post_init__(self) -> None:
        for name in ("last", "every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"retention: {name} is {value}; allowed: 1 or more, or none")

    def expired(self, folder: Path) -> list[int]:
        everything = iterations(folder)
        if self.last is None:
            return []
        kept = set(everything[-self.last :]) | self.listed | referenced(folder)
        return [
            i
            for i in everything
            if i not in kept and not (self.every and i % self.every == 0) and not self.protected(i)
        ]

    def apply(self, folder: Path) -> list[int]:
        """Deletes what expired; returns the iterations."""
        expired = self.expired(folder)
        for iteration in expired:
            delete(folder / checkpoint_name(iteration))
        return expired


def refer(folder: Path, iteration: int, by: str) -> None:
    """Keeps a checkpoint for as long as `by`, an excursion's run, refers to it.

    One small file a reference, so that excursions starting at the same time cannot lose one.
    """
    checkpoint, references = folder / checkpoint_name(iteration), folder / REFERENCES
    complete(checkpoint)
    references.mkdir(exist_ok=True)
    path = references / _reference_name(iteration, by)
    if not path.exists():
        write_new(path, json.dumps({"iteration": iteration, "by": by}) + "\n")
        sync_folder(references)
    complete(checkpoint)  # a clean-up that looked before the reference was there may have had it


def release(folder: Path, iteration: int, by: str) -> None:
    """Takes a reference back."""
    path = folder / REFERENCES / _reference_name(iteration, by)
    try:
        path.unlink()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {by} holds no reference to it") from None


def _reference_name(iteration: int, by: str) -> str:
    key = hashlib.sha256(by.encode()).hexdigest()[:16]
    return f"{checkpoint_name(iteration)}.{key}.json"


def referenced(folder: Path) -> set[int]:
    """By the names of the files alone: one with damaged content still protects."""
    references = folder / REFERENCES
    if not references.is_dir():
        return set()
    found = (_REFERENCE.fullmatch(entry.name) for entry in references.iterdir())
    return {int(match[1]) for match in found if match}
