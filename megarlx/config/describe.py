"""Prints every field of a configuration: default, what is allowed, what it is for."""

from __future__ import annotations

import io
import json
import shutil
import sys
from dataclasses import dataclass

from pydantic.fields import FieldInfo

from megarlx import plug
from megarlx.config.allowed import allowed, element_section, is_table_of_names, section_of
from megarlx.config.load import CALLED_ELSEWHERE
from megarlx.config.section import OptionsOf, Section


@dataclass(frozen=True)
class FieldLine:
    """One field as the user reads about it."""

    name: str
    default: str
    allowed: str
    description: str


def field_lines(kind: type[Section], before: str = "") -> list[FieldLine]:
    lines: list[FieldLine] = []
    for name, field in kind.model_fields.items():
        if section := section_of(field.annotation):
            lines += field_lines(section, f"{before}{name}.")
            continue
        lines.append(
            FieldLine(
                before + name,
                _default(field),
                allowed(field.annotation, field.metadata),
                field.description or "",
            )
        )
        for options in field.metadata:
            if isinstance(options, OptionsOf):
                for named in plug.ours(options.kind):
                    of_it = f"{before}{name}({options.name}={named})."
                    lines += field_lines(options.section(named), of_it)
        if section := element_section(field.annotation):
            inside = ".NAME." if is_table_of_names(field.annotation) else "[]."
            lines += field_lines(section, f"{before}{name}{inside}")
    return lines


def describe(kind: type[Section], word: str = "", *, rich: bool | None = None) -> str:
    """A table for a terminal (`rich`; default: where stdout is one), plain text elsewhere.

    `word`: keys of that section, or else all that have it in their name or description, or that
    other trainers call so.
    """
    word = CALLED_ELSEWHERE.get(word, word)
    every = field_lines(kind)
    lines = [line for line in every if f".{line.name}".startswith(f".{word}.")]
    lines = lines or [line for line in every if word in line.name or word in line.description]
    if not lines:
        return ""
    if rich is None:
        rich = sys.stdout.isatty()
    return _table(lines) if rich else _plain(lines)


def _default(field: FieldInfo) -> str:
    noted = field.json_schema_extra
    if isinstance(noted, dict) and "default" in noted:
        return f"({noted['default']})"
    if field.is_required():
        return "(required)"
    value = field.get_default(call_default_factory=True)
    return "(absent)" if value is None else json.dumps(value, default=_sparse)


def _sparse(section: Section) -> dict[str, object]:
    """A default that is a section, as its file would say it."""
    return section.model_dump(mode="json", exclude_unset=True)


def _plain(lines: list[FieldLine]) -> str:
    texts = []
    for line in lines:
        texts.append(f"{line.name} = {line.default}   {line.allowed}")
        texts.append(f"    {line.description}")
    return "\n".join(texts) + "\n"


def _table(lines: list[FieldLine]) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table(row_styles=["", "dim"])
    table.add_column("key", min_width=max(len(line.name) for line in lines))
    for heading in ("default", "allowed", "what it is"):
        table.add_column(heading)
    for line in lines:
        table.add_row(line.name, line.default, line.allowed, line.description)
    out = io.StringIO()
    width = shutil.get_terminal_size((120, 40)).columns
    Console(file=out, width=width, force_terminal=True, markup=False).print(table)
    return out.getvalue()
