"""Hashes a run's settings, and labels runs of one cell by the settings in which they differ."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any

from megarlx.config.model import resolved_model
from megarlx.config.objectives import MADE
from megarlx.report.runs import Run

TEMPLATES = ("template.", "templates.")
LONGEST_VALUE = 32  # characters of a setting's value, as JSON, in a label
MOST_TOLD = 4  # settings in a label; runs that differ in more are told apart by their names


def settings_hash(runs: Sequence[Run]) -> str:
    """The same for the same experiment, whatever its seeds, their number, and where it ran."""
    texts = {
        json.dumps([run.recipe, comparable(run.told)], sort_keys=True)
        for run in runs
        if run.settings
    }
    return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()


def comparable(value: Any) -> Any:
    """Without seeds and paths. A path is a text with a slash: what the data is, its name tells.
    What lies in the folder of a maker is the same file on any machine."""
    if isinstance(value, Mapping):
        return {
            key: comparable(inside)
            for key, inside in value.items()
            if key != "seed" and not key.endswith("_seed") and not _is_path(inside)
        }
    if isinstance(value, list | tuple):
        return [comparable(inside) for inside in value if not _is_path(inside)]
    return value


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and "/" in value and not value.startswith(MADE)


def flat(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """("stages.0.steps", 60) and so on, of every setting that is neither a seed nor a path."""
    value = comparable(value)
    if isinstance(value, Mapping):
        for key, inside in value.items():
            yield from flat(inside, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for number, inside in enumerate(value):
            yield from flat(inside, f"{where}.{number}")
    else:
        yield where, value


def setting_named(run: Run, name: str) -> Any:
    """The first setting of this name at any depth; None where there is none."""
    return next((v for key, v in flat(run.settings) if key.split(".")[-1] == name), None)


def parameters(run: Run) -> int | None:
    model = run.settings.get("model")
    if not isinstance(model, Mapping):
        return None
    try:
        return resolved_model(model).parameters()
    except ValueError:  # settings of another version: the report can do without
        return None


def told_apart(runs: Sequence[tuple[Run, Hashable]]) -> dict[str, str]:
    """Run's name -> the settings in which runs that share a key differ; "" where none do.

    A setting that tells two runs of one key apart is told of all runs, so that a sweep's axis has
    a value everywhere. Runs of one key with the same settings, or with others that are too long or
    too many for a label, are told apart by their names.
    """
    by_key: defaultdict[Hashable, list[Run]] = defaultdict(list)
    for run, key in runs:
        by_key[key].append(run)
    settings = {run.name: _described(run) for run, _ in runs}
    axes: dict[str, None] = {}
    named: set[str] = set()
    for group in by_key.values():
        names = [run.name for run in group]
        tells = _tell_apart([settings[name] for name in names])
        if len(tells) > MOST_TOLD:
            named.update(names)
        else:
            axes |= dict.fromkeys(tells)
    told = {
        name: ", ".join(f"{axis.split('.')[-1]} {_short(found.get(axis))}" for axis in axes)
        for name, found in settings.items()
    } | {name: name for name in named}
    for group in by_key.values():
        labels = [told[run.name] for run in group]
        for run in group:
            if run.name not in named and labels.count(told[run.name]) > 1:
                told[run.name] = ", ".join(filter(None, (run.name, told[run.name])))
    return told


def _tell_apart(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings in which runs differ, of those that make a label."""
    found = []
    for setting in dict.fromkeys(setting for run in runs for setting in run):
        values = {json.dumps(run.get(setting)) for run in runs}
        if len(values) > 1 and _tells(setting, values):
            found.append(setting)
    return found


def _tells(setting: str, values: Collection[str]) -> bool:
    """Whether the values of a setting make a label. A template is a text of several lines."""
    return not setting.startswith(TEMPLATES) and max(map(len, values)) <= LONGEST_VALUE


def _described(run: Run) -> dict[str, Any]:
    """All settings, but of the model its size where that is known: one number, not ten."""
    found = dict(flat(run.told))
    size = parameters(run)
    if size is None:
        return found
    return {k: v for k, v in found.items() if not k.startswith("model.")} | {"parameters": size}


def _short(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
        return quantity(value)
    return "–" if value is None else str(value)


def quantity(number: float) -> str:
    """Tokens and parameters in a few characters: 2.1M, 4B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
