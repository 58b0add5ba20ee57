"""Names of checkpoints: RUN, RUN@latest, RUN@1000, RUN@tokens:4B. Nothing is written here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarlx.checkpoint import checkpoint_name, complete, iterations, latest, read_manifest
from megarlx.hf.on_the_fly import run_of_model
from megarlx.hf.sources import is_hugging_face
from megarlx.run.directory import RunError

FORMS = "RUN, RUN@latest, RUN@1000, RUN@tokens:4B, or a folder of Hugging Face"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_TOKENS = re.compile(r"tokens:(\d+(?:\.\d+)?)([KMBT]?)", re.IGNORECASE)


@dataclass(frozen=True)
class RunReference:
    """A checkpoint that was there, whole, when its name was resolved."""

    run: Path
    iteration: int
    checkpoint: Path


def resolve(text: str, beside: Path = Path("runs")) -> RunReference:
    """The checkpoint that `text` names; an error lists what there is.

    A folder of Hugging Face is converted into one of `beside`, unless it was before.
    """
    run, which = _split(text)
    if is_hugging_face(run):
        run = run_of_model(run, beside)
    folder = run / "checkpoints"
    there = iterations(folder)
    if not there:
        what = "holds no checkpoints" if run.is_dir() else "is not there"
        raise RunError(f"{text}: the run {run} {what}; allowed are {FORMS}")
    if which == "latest":
        checkpoint = latest(folder, read_only=True)
        assert checkpoint is not None  # some are there
        return RunReference(run, complete(checkpoint).iteration, checkpoint)
    if which.isdecimal():
        iteration = int(which)
        if iteration not in there:
            raise RunError(f"{text}: iteration {iteration} was not saved; {_listed(run, there)}")
    elif match := _TOKENS.fullmatch(which):
        iteration = _at_tokens(text, run, there, float(match[1]) * UNITS[match[2].upper()])
    else:
        raise RunError(f"{text}: '{which}' names no checkpoint; allowed are {FORMS}")
    checkpoint = folder / checkpoint_name(iteration)
    complete(checkpoint)
    return RunReference(run, iteration, checkpoint)


def _split(text: str) -> tuple[Path, str]:
    """A folder may have an @ in its own name: what is there as it stands is the run."""
    run, at, which = text.rpartition("@")
    if not at or Path(text).is_dir():
        return Path(text), "latest"
    return Path(run), which or "latest"


def tokens_of(state: Mapping[str, Any]) -> dict[str, int]:
    """Tokens trained on up to a checkpoint, by objective, those of its ancestors included.

    `state` is a manifest's.
    """
    run = state.get("run", {})
    tokens = run.get("tokens", 0) if isinstance(run, dict) else None
    counts = {"pretraining": tokens} if isinstance(tokens, int) else tokens
    if not isinstance(counts, dict) or not all(type(n) is int and n >= 0 for n in counts.values()):
        raise RunError(
            f"the checkpoint's state counts tokens as {counts!r:.80}; expected whole numbers of "
            "at least 0 by objective"
        )
    return dict(counts)


def trunk_tokens(state: Mapping[str, Any]) -> int:
    return tokens_of(state).get("pretraining", 0)


def _at_tokens(text: str, run: Path, there: list[int], wanted: float) -> int:
    """The first checkpoint at or past that many tokens of pre-training."""
    seen = []
    for iteration in there:
        path = run / "checkpoints" / checkpoint_name(iteration)
        tokens = trunk_tokens(read_manifest(path).state)
        if tokens >= wanted:
            return iteration
        seen.append(f"{iteration} ({tokens:,} tokens)")
    raise RunError(
        f"{text}: no checkpoint has seen {wanted:,.0f} tokens of pre-training; {run} holds "
        + ", ".join(seen[-20:])
    )


def _listed(run: Path, there: list[int]) -> str:
    shown = ", ".join(map(str, there if len(there) <= 40 else [*there[:20], "…", *there[-19:]]))
    return f"{run} holds {shown}"
