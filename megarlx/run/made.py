"""What a run reads where a maker writes it: its data, its paths, its suites."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megarlx.config import Config
from megarlx.config.evaluation import SuiteConfig
from megarlx.config.objectives import MADE
from megarlx.config.run_sections import DataConfig
from megarlx.data import making
from megarlx.data.making import Made
from megarlx.run.directory import RunError


def write_data(config: Config) -> None:
    """What a run's maker makes, unless it is there."""
    data = config.data
    if data is not None and data.maker is not None:
        making.make(data.maker, data.place, data.options)


def made_of(config: Config) -> Made | None:
    data = config.data
    if data is None or data.maker is None:
        return None
    return making.made(data.maker, data.place, data.options)


def data_of(config: Config) -> DataConfig | None:
    """What is read, with files in place of the maker that wrote them."""
    data, made = config.data, made_of(config)
    if data is None or made is None:
        return data
    sources = (*made.sources, *data.sources)  # of the maker, and rollouts beside them
    changes: dict[str, Any] = {
        "maker": None,
        "folder": None,
        "options": {},
        "tokenizer": made.tokenizer,
        "sources": sources,
        "validation": made.validation,
    }
    if not sources:  # nothing to pre-train on
        return data.model_copy(update=changes)
    return DataConfig.model_validate({**data.model_dump(), **changes})


def path_of(text: str, config: Config) -> str:
    """A path of the configuration, with the maker's folder put in."""
    if MADE not in text:
        return text
    if config.data is None or config.data.maker is None:
        raise RunError(f"the path {text!r} asks for a maker's folder, but [data] names no maker")
    return text.replace(MADE, config.data.place)


def file_of(text: str, config: Config, key: str) -> str:
    """As `path_of`, of a file that must be there; `key` says it."""
    path = path_of(text, config)
    if not Path(path).is_file():
        raise RunError(
            f"{key} is {path!r}: there is no such file; docs/data.md shows what its lines look like"
        )
    return path


def made_for(suites: Sequence[SuiteConfig], config: Config) -> Made | None:
    """What these suites ask of, where any asks of what is made."""
    return made_of(config) if any(suite.made is not None for suite in suites) else None
