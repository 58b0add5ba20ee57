"""The folder of a run.

RUN/  config.toml resolved.json lineage.json metrics.jsonl tensorboard/ checkpoints/ logs/
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import torch

from megarlx import __version__
from megarlx.checkpoint import AVERAGE, checkpoint_name, iterations
from megarlx.config import CHOSEN, Config
from megarlx.config.section import Section
from megarlx.data.token_files import write_atomically
from megarlx.data.tokenizer import Tokenizer
from megarlx.redact import hidden_toml, redacted

# What a resumed run may be told anew. Everything else makes it another run.
MAY_CHANGE = (
    "layout",
    "checkpoints",
    "logging",
    "training.steps",
    "training.sequences_per_microbatch",
    "training.device",
    "training.recompute",
    # code for the same formulas, which each machine chooses
    *("training.layers", "training.attention", "training.tf32"),
    "training.capture_below_parameters",
    "training.kept_gradients_mib",
    *("rl.prefill_tokens", "objectives.*.rl.prefill_tokens", "evaluation.prefill_tokens"),
    "data.validation",
    "stages.*.placement",
    "stages.*.generate_together",
)


MAY_NOT = ("checkpoints.average_decay",)  # of these: it is of all steps, or of none

SHOWN_CHARACTERS = 60  # of a value that differs
SHOWN_KEYS = 12  # that differ


# Of a checkpoint, which are read: those of its last step, or their moving average.
Weights = Literal["last", "average"]
PREFIX_OF: Mapping[Weights, str] = {"last": "", "average": AVERAGE}  # of the tensors' names


class RunError(ValueError):
    """A run that cannot be started or gone on with as asked."""


class SaidByFirstRank(RunError):
    """The first rank's error, on the others: one of them tells it."""


@dataclass(frozen=True)
class Parent:
    """A checkpoint that an excursion started from."""

    run: str
    iteration: int
    digest: str
    trunk_tokens: int  # of pre-training, up to there
    tokens: dict[str, int]  # by objective, of all ancestors
    replayed: str | None = None  # the checkpoint itself, where the parent had not saved it
    weights: Weights = "last"

    def is_same(self, other: Parent) -> bool:
        """The same checkpoint, wherever it lies."""
        mine, theirs = ((one.iteration, one.digest, one.weights) for one in (self, other))
        return mine == theirs

    @property
    def checkpoint(self) -> Path:
        if self.replayed is not None:
            return Path(self.replayed)
        return Path(self.run) / "checkpoints" / checkpoint_name(self.iteration)


class RunDirectory:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.tokenizer = path / "tokenizer.json"

    @property
    def lineage(self) -> dict[str, Any]:
        """What lineage.json says; nothing where it is not there."""
        path = self.path / "lineage.json"
        if not path.exists():
            return {}
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise RunError(f"{path}: cannot be read: {error!r}") from None

    @property
    def parent(self) -> Parent | None:
        """Where the run branched from, by its lineage.json."""
        if not (lineage := self.lineage):
            return None
        try:
            parent = lineage["parent"]
            return None if parent is None else Parent(**parent)
        except (KeyError, TypeError) as error:
            path = self.path / "lineage.json"
            raise RunError(f"{path}: cannot be read: {error!r}") from None

    @property
    def has_checkpoints(self) -> bool:
        return bool(iterations(self.checkpoints))

    def check_free(self) -> None:
        """A run can lie here: no file does, and no folder of runs."""
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; a run is a folder: choose another --out")
        if not self.path.is_dir() or self.has_checkpoints or (self.path / "lineage.json").exists():
            return
        if runs := sorted(path.parent.name for path in self.path.glob("*/lineage.json")):
            raise RunError(
                f"{self.path} is a folder of runs, {runs[0]} among them; a run has one of its own: "
                f"--out {self.path / 'NAME'}"
            )

    def check_fresh(self) -> None:
        """`--fresh` never overwrites."""
        if self.has_checkpoints:
            raise RunError(
                f"{self.path} holds checkpoints, up to step {iterations(self.checkpoints)[-1]}; "
                "--fresh starts in an empty folder only: choose another --out or delete this one"
            )

    def check_was_trained(self) -> None:
        """A sum of weights has no moments: nothing can go on with it."""
        lineage = self.lineage
        if "sum" in lineage:
            raise RunError(
                f"{self.path} is a {lineage.get('recipe')}: weights were summed, which has no "
                "moments to go on with; `megarlx branch` starts a run of its own from it"
            )

    def check_same_run(self, config: Config) -> None:
        """Refuses to go on with another model, data, seed or objective, and says what differs."""
        saved = self._saved()
        saved.pop(CHOSEN, None)
        told = redacted(config.model_dump(mode="json"))
        differences = {
            key: f"  {key}: was {_short(was)}, is {_short(now)}"
            for key, was, now in _differences(_filled(saved, config, told), told)
            if key in MAY_NOT or not any(_covers(free, key) for free in MAY_CHANGE)
        }
        if differences:
            shown = list(differences.values())[:SHOWN_KEYS]
            if len(differences) > SHOWN_KEYS:
                shown.append(f"  and {len(differences) - SHOWN_KEYS} more keys")
            raise RunError(
                f"{self.path} was trained with another configuration:\n"
                + "\n".join(shown)
                + f"\nA resumed run may change {', '.join(MAY_CHANGE)} (but not "
                f"{', '.join(MAY_NOT)}); for the rest, use --out "
                f"with another folder{self._more_steps(differences)}"
            )

    def _more_steps(self, differences: Iterable[str]) -> str:
        if not any(fnmatch(key, "stages.*.steps") for key in differences):
            return ""
        return (
            ". A stage keeps its length, on which its learning rates depend; for more steps give "
            f"megarlx branch {self.path}@latest a recipe, whose objectives go on where they say "
            "inherit = true"
        )

    def _saved(self) -> dict[str, Any]:
        path = self.path / "resolved.json"
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError(
                f"{self.path} holds checkpoints but no resolved.json to compare with"
            ) from None
        except ValueError as error:
            raise RunError(f"{path} is not JSON: {error}") from None
        if not isinstance(saved, dict):
            raise RunError(f"{path} holds no object")
        return saved

    def begun_with(self) -> dict[str, str]:
        """What a run that goes on began with, of what may be chosen: `training.…` and its value."""
        if not self.has_checkpoints:
            return {}
        training = self._saved().get("training")
        if not isinstance(training, dict):
            raise RunError(f"{self.path / 'resolved.json'} has no training")
        return {f"training.{key}": str(value) for key, value in training.items()}

    def write_description(
        self,
        config: Config,
        source: Path,
        tokenizer: Tokenizer | None = None,
        chosen: Mapping[str, str] | None = None,
    ) -> None:
        """What the run was told and where it comes from; by one process, before the first step."""
        self.path.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".toml" and source.resolve() != (self.path / "config.toml").resolve():
            text = hidden_toml(source.read_text(encoding="utf-8"))
            write_atomically(self.path / "config.toml", text)
        resolved = {**redacted(config.model_dump(mode="json")), CHOSEN: dict(chosen or {})}
        text = json.dumps(resolved, indent=2, ensure_ascii=False)
        write_atomically(self.path / "resolved.json", text + "\n")
        if tokenizer is not None and not self.tokenizer.exists():
            tokenizer.save(self.tokenizer)
        if not (self.path / "lineage.json").exists():
            self.write_json("lineage.json", self._lineage(config))

    def _lineage(self, config: Config) -> dict[str, Any]:
        return {
            "parent": None,
            "recipe": None,
            "trunk_tokens": 0,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seed": config.training.seed,
            "restored": [],
            "reset": [],
            "composition": {},
            "versions": versions(),
        }

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / name, json.dumps(value, indent=2) + "\n")


def _covers(free: str, key: str) -> bool:
    return fnmatch(key, free) or fnmatch(key, f"{free}.*")


def versions() -> dict[str, str]:
    return {
        "megarlx": __version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…"


def _filled(saved: Any, given: Any, told: Any) -> Any:
    """What a run was told, with the default of every key that there was not yet when it began and
    that nobody has set since. `told` is what is `given` now, as JSON."""
    if isinstance(saved, Mapping) and isinstance(given, Section):
        fields = type(given).model_fields.items()
        plain = {key: field.get_default(call_default_factory=True) for key, field in fields}
        new = {k: told[k] for k in plain if k not in saved and getattr(given, k) == plain[k]}
        return {k: _filled(v, getattr(given, k, None), told.get(k)) for k, v in saved.items()} | new
    if isinstance(saved, Mapping) and isinstance(given, Mapping):
        return {k: _filled(v, given.get(k), told.get(k)) for k, v in saved.items()}
    if isinstance(saved, list) and isinstance(given, tuple) and len(saved) == len(given):
        return [_filled(*parts) for parts in zip(saved, given, told, strict=True)]
    return saved


def _differences(saved: Any, now: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        for key in [*saved, *(k for k in now if k not in saved)]:
            inside = f"{where}.{key}" if where else str(key)
            yield from _differences(saved.get(key), now.get(key), inside)
    elif isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        for at, (one, other) in enumerate(zip(saved, now, strict=True)):
            yield from _differences(one, other, f"{where}.{at}")
    elif saved != now:
        yield where, saved, now
