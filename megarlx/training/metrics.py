"""What a run says about itself: the same numbers in metrics.jsonl and in TensorBoard.

Only the process with the files (rank 0) has a writer. A line of metrics.jsonl is one step:
{"step": 12, "loss/pretraining": 3.4, …}, with "tokens", of pre-training, where these are known.
TensorBoard sorts its groups by name: there some have another one, so that what is learned stands
first. Losses and results are there over the tokens of pre-training too, as by_tokens/…: trunks
beside the excursions that start from them.
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

# The group of a key -> what it is called in TensorBoard.
BOARD = {
    "grad_norm": "optimizer/grad_norm",
    "lr": "optimizer/lr",
    "share": "optimizer/share",
    "weight_norm": "optimizer/weight_norm",
    "data": "sources",
    "perf": "speed",
    "cost": "spent",
}
BY_TOKENS = "by_tokens"


def board_tag(key: str) -> str:
    group, _, name = key.partition("/")
    return f"{BOARD.get(group, group)}/{name}" if name else key


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
        board = run / "tensorboard"
        _wait_for_a_second_of_its_own(board)
        # purge_step hides events of steps that will be written again; and of as many tokens.
        self._board: Any = SummaryWriter(str(board), purge_step=resume_at)
        self._trunk_tokens = 0
        self._trackers = trackers
        for line in read_metrics(self.path):
            self._add_by_tokens(line, line.get("tokens", 0), hidden_from=resume_at)
        self._trunk_tokens = trunk_tokens

    def scalars(self, step: int, values: Mapping[str, float], trunk_tokens: int = 0) -> None:
        """After a step, at which so many tokens of pre-training have been read, ancestors' too."""
        for key, value in values.items():
            self._board.add_scalar(board_tag(key), value, step)
        self._add_by_tokens(values, trunk_tokens)
        line: dict[str, Any] = {"step": step}
        if trunk_tokens:
            line["tokens"] = trunk_tokens
        line |= {key: _finite(value) for key, value in values.items()}
        self._reopen_if_gone()
        with naming(self.path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if self._trackers is not None:
            self._trackers.scalars(step, values)

    def _add_by_tokens(
        self, values: Mapping[str, Any], trunk_tokens: int, hidden_from: int = 0
    ) -> None:
        """Where pre-training stands still a course would be a pile of points: results only."""
        if not trunk_tokens:
            return
        grown, self._trunk_tokens = trunk_tokens > self._trunk_tokens, trunk_tokens
        if trunk_tokens < hidden_from:
            return
        for key, value in values.items():
            result = key.startswith("eval/") and not key.startswith("eval/perplexity/")
            if result or (grown and key.startswith("loss/")):
                self._board.add_scalar(f"{BY_TOKENS}/{key}", float(value), trunk_tokens)

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
