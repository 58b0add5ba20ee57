"""The files of an evaluation: RUN/evaluations/iter_00001000.SUITE.json and RUN/samples/.

A result that is there with the same settings is not computed again, so an evaluation that was
killed goes on with the suite it was at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megarlx.checkpoint import checkpoint_name
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
    """The result in the file, where it was computed with just these settings."""
    if not path.exists():
        return None
    found = read_result(path)
    return found if found.get("settings") == json.loads(json.dumps(settings)) else None


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
