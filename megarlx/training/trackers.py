"""Weights & Biases and MLflow beside TensorBoard, for those who keep their runs there.

Off unless `logging.trackers` names them. A tracker gets the same keys and numbers as
metrics.jsonl, which stays what everything else reads. It must be there when a run starts; when it
fails later, that is said once and the run goes on without it.
"""

from __future__ import annotations

import html
import importlib
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megarlx.data.token_files import write_atomically

IDS = "trackers.json"  # under which name a run goes on there when it is resumed


class Tracker(Protocol):
    """A place that shows numbers and texts of a run."""

    name: str
    run_id: str
    failures: tuple[type[Exception], ...]  # what a service that is away raises

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def text(self, step: int, key: str, text: str) -> None: ...

    def close(self) -> None: ...


class WandbTracker:
    name = "wandb"

    def __init__(self, project: str, run: Path, config: Mapping[str, Any], known: str | None):
        self._wandb: Any = importlib.import_module("wandb")
        self.failures: tuple[type[Exception], ...] = (self._wandb.errors.Error, OSError)
        self._run = self._wandb.init(
            project=project,
            name=run.name,
            dir=str(run),
            config=dict(config),
            id=known,
            resume="allow",
        )
        self.run_id = str(self._run.id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def text(self, step: int, key: str, text: str) -> None:
        # What a model wrote is shown and never rendered.
        self._run.log({key: self._wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    name = "mlflow"

    def __init__(self, project: str, run: Path, config: Mapping[str, Any], known: str | None):
        self._mlflow: Any = importlib.import_module("mlflow")
        self.failures: tuple[type[Exception], ...] = (
            self._mlflow.exceptions.MlflowException,
            OSError,
        )
        self._mlflow.set_experiment(project)
        started = self._mlflow.start_run(run_id=known, run_name=None if known else run.name)
        self.run_id = str(started.info.run_id)
        if known is None:
            self._mlflow.log_dict(dict(config), "resolved.json")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def text(self, step: int, key: str, text: str) -> None:
        self._mlflow.log_text(text, f"{key}/step_{step:08d}.txt")

    def close(self) -> None:
        self._mlflow.end_run()


TRACKERS: Mapping[str, type[WandbTracker] | type[MlflowTracker]] = {
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
}


def check_installed(names: Sequence[str]) -> None:
    """On every rank, so that none is left waiting for the one that would miss it."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"logging.trackers names {name}, which is not installed: "
                f"pip install 'megarlx[{name}]'"
            )


class Trackers:
    """All that a run has, by rank 0. Errors of one end that one only."""

    def __init__(
        self, names: Sequence[str], project: str, run: Path, config: Mapping[str, Any]
    ) -> None:
        path = run / IDS
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self._open: list[Tracker] = [
            TRACKERS[name](project, run, config, known.get(name)) for name in names
        ]
        if ids := {tracker.name: tracker.run_id for tracker in self._open}:
            run.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(known | ids, indent=2) + "\n")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._tell("scalars", step, values)

    def text(self, step: int, key: str, text: str) -> None:
        self._tell("text", step, key, text)

    def close(self) -> None:
        self._tell("close")
        self._open = []

    def _tell(self, what: str, *words: Any) -> None:
        for tracker in tuple(self._open):
            try:
                getattr(tracker, what)(*words)
            except tracker.failures as error:
                self._open.remove(tracker)
                print(
                    f"warning: {tracker.name} gets no more metrics of this run "
                    f"({type(error).__name__}: {error}); metrics.jsonl and TensorBoard have them",
                    file=sys.stderr,
                )
