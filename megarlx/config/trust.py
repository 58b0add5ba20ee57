"""What another run's configuration may name: what ships, and what the user says to trust.

A name resolves to code. A user's own configuration may name anything; a run that was made by
somebody else brings its configuration along, and is opened all the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, get_args, get_origin

from megarlx import plug
from megarlx.config.allowed import without_none
from megarlx.config.load import ConfigError
from megarlx.config.objectives import RL, SFT
from megarlx.config.section import Named, OptionsOf, Section
from megarlx.config.sections import Config

# Names of ours that do what their options say: run code, or send what is in the environment.
OPEN_ENDED = {
    *(("environment", "gymnasium"), ("environment", "tools")),
    *(("reward", "judge"), ("reward", "chat_judge")),
}


def names_in(
    section: Section, keys: Collection[str] | None = None, before: str = ""
) -> Iterator[tuple[str, str, str]]:
    """(dotted key, kind, name) of everything that a section, or `keys` of it, names."""
    for key, field in type(section).model_fields.items():
        if keys is None or key in keys:
            value, where = getattr(section, key), before + key
            yield from _named(value, field.annotation, field.metadata, where)
            for options in field.metadata:
                if isinstance(options, OptionsOf):
                    yield from _in_options(options, getattr(section, options.name), value, where)


def _in_options(
    options: OptionsOf, named: str | None, value: Mapping[str, Any], where: str
) -> Iterator[tuple[str, str, str]]:
    """Of what is ours; what is not is itself refused, or trusted with all that it is told."""
    if named in plug.ours(options.kind):
        yield from names_in(options.section(named).model_validate(value), None, f"{where}.")


def _named(
    value: Any, annotation: Any, metadata: Sequence[Any], where: str
) -> Iterator[tuple[str, str, str]]:
    annotation = without_none(annotation)
    if get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        yield from _named(value, annotation, [*metadata, *more], where)
    elif isinstance(value, Section):
        yield from names_in(value, None, where + ".")
    elif isinstance(value, str):
        yield from ((where, one.kind, value) for one in metadata if isinstance(one, Named))
    elif isinstance(value, tuple) and get_args(annotation):
        for at, element in enumerate(value):
            yield from _named(element, get_args(annotation)[0], (), f"{where}[{at}]")
    elif isinstance(value, Mapping) and get_args(annotation):
        for key, element in value.items():
            yield from _named(element, get_args(annotation)[1], (), f"{where}.{key}")


def needs_trust(kind: str, name: str) -> bool:
    return name not in plug.ours(kind) or (kind, name) in OPEN_ENDED


def used(config: Config) -> Config:
    """Without the objectives that no stage trains."""
    trained = {name for stage in config.all_stages for name in stage.objectives}
    others = {name: one for name, one in config.objectives.items() if name in trained}
    changes: dict[str, Any] = {"objectives": others}
    changes |= {name: None for name in (SFT, RL) if name not in trained}
    return config.model_copy(update=changes)


def untold(names: Iterable[tuple[str, str, str]]) -> list[str]:
    """Of what `names_in` finds, each name once that needs trust where another run says it."""
    return list(dict.fromkeys(name for _, kind, name in names if needs_trust(kind, name)))


def check_trust(
    names: Iterable[tuple[str, str, str]], run: str, trusted: Collection[str] = ()
) -> None:
    """Refuses names out of the configuration of `run` that are neither ours nor trusted."""
    problems = [
        f"{run}: {where} is {name!r}: code that another configuration names is not run unasked; "
        f"if you know what it does, allow it with --trust {name}, in Python trusted=[{name!r}]"
        for where, kind, name in names
        if name not in trusted and needs_trust(kind, name)
    ]
    if problems:
        raise ConfigError(problems)
