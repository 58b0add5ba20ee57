"""The state that a run keeps beside its tensors: of the form that it was written in, or refused.

A digest says that a checkpoint is as it was written; by whom it does not say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megarlx.checkpoint.errors import CheckpointError
from megarlx.checkpoint.manifest import Manifest

# What reading a value of another form than expected ends in.
OF_ANOTHER_FORM = (LookupError, TypeError, AttributeError, OverflowError, RecursionError)


@contextmanager
def reading_state(checkpoint: Path) -> Iterator[None]:
    """A state that says too little, or something else, is the checkpoint's error."""
    try:
        yield
    except OF_ANOTHER_FORM as error:
        raise CheckpointError(
            f"{checkpoint}: its state cannot be read: {type(error).__name__}: {error}"
        ) from error


def check_run_state(checkpoint: Path, manifest: Manifest) -> None:
    """What a run goes on from is counts that a run can have reached."""
    with reading_state(checkpoint):
        state = manifest.state
        if state["steps_done"] != manifest.iteration:
            raise CheckpointError(
                f"{checkpoint}: its state is of step {state['steps_done']!r}, its manifest of "
                f"iteration {manifest.iteration}"
            )
        for key in ("tokens", "positions"):
            _check_counts(checkpoint, key, state[key])
        for name, work in state["work"].items():
            _check_counts(checkpoint, f"work.{name}", work)
        _check_counts(checkpoint, "run.cost", state["run"]["cost"])
        for name, mean in state["shares"].get("means", {}).items():
            if not _is_number(mean) or not 0 <= mean <= 1:
                _refuse(checkpoint, f"shares.means.{name}", mean, "a number from 0 to 1")


def _check_counts(checkpoint: Path, key: str, counts: Mapping[str, Any]) -> None:
    for name, count in counts.items():
        if not _is_number(count) or count < 0:
            _refuse(checkpoint, f"{key}.{name}", count, "a number of at least 0")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 2**63


def _refuse(checkpoint: Path, key: str, value: Any, expected: str) -> None:
    raise CheckpointError(f"{checkpoint}: the state's {key} is {value!r:.80}; expected {expected}")
