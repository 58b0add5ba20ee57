"""The files of an evaluation: RUN/evaluations/iter_00001000.SUITE.json and RUN/samples/.

A result that is there with the same settings is not computed again, so an evaluation that was
killed goes on with the suite it was at, and `megarlx evaluate` takes what training has measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megarlx.checkpoint import checkpoint_name
from megarlx.config.evaluation import SuiteConfig
from megarlx.data.token_files import write_atomically

FORMAT = 1
Result = dict[str, Any]


class ResultError(ValueError):
    """A file that should hold a result, and does not."""


def result_path(run: Path, iteration: int, suite: str) -> Path:
    return run / "evaluations" / f"{checkpoint_name(iteration)}.{suite}.json"


def samples_path(run: Path, iteration: int, suite: str) -> Path:
    return run / "samples" / f"{checkpoint_name(iteration)}.{suite}.jsonl"


def read_result(path: Path) -> Result:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultError(f"{path} is not JSON: {error}") from None
    version = found.get("format") if isinstance(found, dict) else None
    if version != FORMAT:
        raise ResultError(f"{path} has the format {version!r}; this megarlx reads {FORMAT}")
    result: Result = found
    return result


def finished(path: Path, settings: Mapping[str, Any]) -> Result | None:
    """The result in the file, where it was computed with just these settings.

    Weights that were measured while they were trained have no digest: they are those of the
    checkpoint which the same run saved at that step.
    """
    if not path.exists():
        return None
    found = read_result(path)
    there, wanted = _completed(found.get("settings") or {}), _completed(settings)
    of_weights = [one.pop("checkpoint", None) for one in (there, wanted)]
    same = there == wanted and (of_weights[0] == of_weights[1] or "" in of_weights)
    return found if same else None


def _completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON; what a suite's settings did not know yet when it was computed has its default."""
    defaults = {k: f.default for k, f in SuiteConfig.model_fields.items() if not f.is_required()}
    suite = {**defaults, **settings.get("suite", {})}
    found: dict[str, Any] = json.loads(json.dumps({**settings, "suite": suite}))
    return found


def results_of(run: Path, suite: str) -> list[Result]:
    """Of every checkpoint that was evaluated with the suite, in order."""
    found = (run / "evaluations").glob(f"iter_*.{suite}.json")
    return sorted((read_result(path) for path in found), key=lambda r: int(r["iteration"]))


def write_result(path: Path, result: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(_plain(result), allow_nan=False) + "\n")


def write_samples(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(f"{line}\n" for line in _json_lines(lines)))


def _json_lines(lines: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for line in lines:
        yield json.dumps(_plain(line), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    """JSON has no NaN: what is not known is null."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
