"""What a run says about itself: the same numbers in TensorBoard and in metrics.jsonl.

Only the process with the files (rank 0) has a writer. A line of metrics.jsonl is one step:
{"step": 12, "loss/pretraining": 3.4, …}; keys are those of TensorBoard. There, the run
tensorboard/tokens shows them over the tokens of pre-training in place of steps: trunks beside the
excursions that start from them.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megarlx.naming import naming
from megarlx.training.trackers import Trackers


class MetricsWriter:
    """Appends to a run's metrics; `resume_at`, a step, drops what an interrupted run wrote from it
    on, when `trunk_tokens` of pre-training had been read."""

    def __init__(
        self,
        run: Path,
        *,
        resume_at: int = 0,
        trunk_tokens: int = 0,
        trackers: Trackers | None = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = run / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_from(self.path, resume_at)
        self._file = self.path.open("a", encoding="utf-8")
        board, over_tokens = run / "tensorboard", run / "tensorboard" / "tokens"
        _wait_for_a_second_of_its_own(board)
        # purge_step hides events of steps that will be written again.
        self._board: Any = SummaryWriter(str(board), purge_step=resume_at)
        self._over_tokens: Any = SummaryWriter(str(over_tokens), purge_step=trunk_tokens + 1)
        self._trunk_tokens = trunk_tokens
        self._trackers = trackers

    def scalars(self, step: int, values: Mapping[str, float], trunk_tokens: int = 0) -> None:
        """After a step, at which so many tokens of pre-training have been read, ancestors' too."""
        grown, self._trunk_tokens = trunk_tokens > self._trunk_tokens, trunk_tokens
        for key, value in values.items():
            self._board.add_scalar(key, value, step)
            # Where pre-training stands still a course would be a pile of points: results only.
            if trunk_tokens and (grown or key.startswith("eval/")):
                self._over_tokens.add_scalar(key, value, trunk_tokens)
        line = {"step": step, **{key: _finite(value) for key, value in values.items()}}
        self._reopen_if_gone()
        with naming(self.path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if self._trackers is not None:
            self._trackers.scalars(step, values)

    def _reopen_if_gone(self) -> None:
        if os.fstat(self._file.fileno()).st_nlink == 0:
            warnings.warn(f"{self.path} was removed; what it held is lost", stacklevel=3)
            self._file.close()
            self._file = self.path.open("a", encoding="utf-8")

    def text(self, step: int, key: str, text: str) -> None:
        self._board.add_text(key, text, step)
        if self._trackers is not None:
            self._trackers.text(step, key, text)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._board.close()
        self._over_tokens.close()
        if self._trackers is not None:
            self._trackers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line cut off by a kill is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: not a line of metrics: {error}") from None
            if not isinstance(found, dict) or type(found.get("step")) is not int:
                raise ValueError(f"{path}:{number}: not a line of metrics: it has no step")
            yield found


def _wait_for_a_second_of_its_own(board: Path) -> None:
    """TensorBoard reads a run's files in the order of their names, which begin with the second they
    were made in; within one second a run that goes on could come before what it goes on from."""
    made = [int(path.name.split(".")[3]) for path in board.rglob("events.out.tfevents.*")]
    while int(time.time()) in made:
        time.sleep(0.02)


def _drop_from(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line["step"] < step]
    temporary = path.with_suffix(".jsonl.new")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def _finite(value: float) -> float | str:
    """JSON has no infinity and no NaN: they are written as the words."""
    return value if math.isfinite(value) else str(value)
