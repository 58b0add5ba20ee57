"""Data that a maker writes before training, and what a run then reads of them.

A maker is a class, named in `[data] maker`. What it is told is `[data.options]`, a section of its
own. `make` writes a folder once: its description is the last file, and only a folder with a
description counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from megarlx import plug
from megarlx.config.evaluation import SuiteConfig
from megarlx.config.objectives import TemplateConfig
from megarlx.config.run_sections import SourceConfig
from megarlx.config.section import Section
from megarlx.data.conversations import Conversation
from megarlx.data.draw import Split
from megarlx.data.token_files import write_atomically

KIND = "data maker"
DESCRIPTION = "made.json"
Line = dict[str, Any]


class MakerError(ValueError):
    """Data that cannot be made, or were not: where, and why."""


@dataclass(frozen=True)
class Wanted:
    """What an evaluation suite wants of a made one. `count` None: as many as the maker likes."""

    kind: str
    count: int | None
    split: Split
    options: Mapping[str, Any]


@dataclass(frozen=True)
class MadeSuite:
    """What an evaluation suite asks.

    lines      as a file of the kind holds them: {"question", "answer"}, {"context", "choices",
               "answer"} or {"text"}, each with an "id" and perhaps a "group"
    identity   a hash of all that the lines depend on; results carry it
    guesses    answers, each as often as its share, that a guesser without a model draws from
    examples   (count, seed, options) to solved examples
    options    names of what `options` of the evaluation suite may say
    splits     what `split` of the evaluation suite may be
    """

    identity: str
    kinds: tuple[str, ...]
    lines: Callable[[Wanted], Iterable[Line]]
    guesses: Callable[[], Sequence[Hashable]] | None = None
    examples: Callable[[int, int, Mapping[str, Any]], Sequence[Conversation]] | None = None
    reward: str = "final_number"  # where the evaluation suite names none
    templated: bool = True
    options: tuple[str, ...] = ()
    splits: tuple[Split, ...] = ("validation", "test")


@dataclass(frozen=True)
class Made:
    """What a run reads. `tokenizer` is a path or 'bytes', as in `[data] tokenizer`."""

    tokenizer: str
    sources: tuple[SourceConfig, ...] = ()
    validation: tuple[SourceConfig, ...] = ()
    suites: Mapping[str, MadeSuite] = field(default_factory=dict)


class DataMaker(Protocol):
    """A maker. Without any state: one is made for each call.

    Where Options has a field `template`, a configuration puts its own [template] there.
    """

    Options: ClassVar[type[Section]]
    template: ClassVar[TemplateConfig | None]  # where [template] is absent
    evaluated: ClassVar[tuple[SuiteConfig, ...]]  # by `megarlx evaluate`, where no suites are given

    def write(self, folder: Path, options: Any) -> None:
        """Files that are there are those of a process that was killed, or that writes the same."""
        ...

    def made(self, folder: Path, options: Any) -> Made: ...


def make(name: str, folder: str | Path, options: Mapping[str, Any]) -> None:
    """Writes the folder unless it holds just this; `options` are resolved ones."""
    folder, wanted = Path(folder), _description(name, options)
    found = _found(folder)
    if found == wanted:
        return
    if found is not None:  # another run may be reading it
        raise MakerError(f"{folder} holds {_different(found, wanted)}; use another folder")
    folder.mkdir(parents=True, exist_ok=True)
    maker: DataMaker = plug.resolve(KIND, name)()
    maker.write(folder, maker.Options.model_validate(wanted["options"]))
    write_atomically(folder / DESCRIPTION, json.dumps(wanted, indent=1) + "\n")


def made(name: str, folder: str | Path, options: Mapping[str, Any]) -> Made:
    """What was written to the folder."""
    folder, wanted = Path(folder), _description(name, options)
    found = _found(folder)
    if found is None:
        raise MakerError(f"{folder} has no {DESCRIPTION}: {name} has not written it to the end")
    if found != wanted:
        raise MakerError(f"{folder} holds {_different(found, wanted)}")
    maker: DataMaker = plug.resolve(KIND, name)()
    return maker.made(folder, maker.Options.model_validate(wanted["options"]))


def _description(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps({"maker": name, "options": dict(options)}))
    return found


def _found(folder: Path) -> Any:
    path = folder / DESCRIPTION
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MakerError(f"{path} is not JSON: {error}") from None


def _different(found: Any, wanted: Mapping[str, Any]) -> str:
    if not isinstance(found, dict) or found.get("maker") != wanted["maker"]:
        return f"what another maker wrote, not {wanted['maker']}"
    theirs, mine = found.get("options", {}), wanted["options"]
    names = [k for k in {**mine, **theirs} if theirs.get(k) != mine.get(k)]
    shown = ", ".join(f"{k} = {_short(theirs.get(k))}, not {_short(mine.get(k))}" for k in names)
    return f"what {wanted['maker']} wrote with other options: {shown}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
