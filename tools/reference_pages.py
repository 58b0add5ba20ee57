"""Writes docs/reference/ (keys of the configuration, commands, names of Python) and the picture of
the packages, all read from the code.

python tools/reference_pages.py            write the pages
python tools/reference_pages.py --check    exit status 1 where a page is not what it would be
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import import_order

import megarlx
from megarlx import plug
from megarlx.cli import COMMANDS
from megarlx.config.describe import FieldLine, field_lines
from megarlx.config.evaluation import SuitesConfig
from megarlx.config.section import Section
from megarlx.config.sections import Config
from megarlx.config.sweep import SweepConfig
from megarlx.run.opened import OpenedRun

DOCS = Path(__file__).resolve().parents[1] / "docs"
FOLDER = DOCS / "reference"
NOTE = "<!-- Written by tools/reference_pages.py; edit the code that it is read from. -->\n\n"
FILES: dict[str, tuple[type[Section], str]] = {
    "A run or a recipe": (Config, "`megarlx train`, `megarlx branch`, `megarlx plan`."),
    "Suites alone": (SuitesConfig, "`megarlx evaluate --config`."),
    "A sweep": (SweepConfig, "`megarlx sweep`, `megarlx demo`."),
}


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def config_page() -> str:
    parts = ["# Keys of the configuration\n\n", NOTE]
    for title, (kind, used_by) in FILES.items():
        parts.append(f"## {title}\n\nRead by {used_by}\n\n")
        sections: dict[str, list[FieldLine]] = {}
        for line in field_lines(kind):
            inside, _, _ = line.name.rpartition(".")
            sections.setdefault(inside, []).append(line)
        for inside, lines in sections.items():
            parts.append(f"### {'[' + inside + ']' if inside else 'Outside of any table'}\n\n")
            parts.append("| key | default | allowed | what it is |\n|---|---|---|---|\n")
            parts += [
                f"| `{line.name.rpartition('.')[2]}` | `{cell(line.default)}` | "
                f"{cell(line.allowed)} | {cell(line.description)} |\n"
                for line in lines
            ]
            parts.append("\n")
    return "".join(parts)


class Recorder:
    """Stands for a parser, and keeps what is added to it and to its groups."""

    def __init__(self) -> None:
        self.added: list[tuple[tuple[str, ...], dict[str, Any]]] = []

    def add_argument(self, *names: str, **options: Any) -> None:
        self.added.append((names, options))

    def add_mutually_exclusive_group(self, **_: Any) -> Recorder:
        return self

    def add_argument_group(self, *_: Any, **__: Any) -> Recorder:
        return self


def argument_row(names: tuple[str, ...], options: dict[str, Any]) -> str:
    value = options.get("metavar")
    if isinstance(value, tuple):  # one name for each of several values
        value = " ".join(value)
    if value is None and "choices" in options:
        value = "|".join(map(str, options["choices"]))
    takes_none = str(options.get("action", "")).startswith("store_")
    if names[0].startswith("-"):
        said = ", ".join(names)
        if not takes_none:
            said += f" {value or names[-1].lstrip('-').replace('-', '_').upper()}"
    else:
        said = value or names[0]
    default = options.get("default")
    shown = "" if default in (None, [], (), False) else f" (default: {default})"
    if "(default" in options["help"]:
        shown = ""
    return f"| `{cell(str(said))}` | {cell(options['help'])}{cell(shown)} |\n"


def commands_page() -> str:
    parts = ["# Commands\n\n", NOTE]
    for name, command in COMMANDS.items():
        recorder = Recorder()
        importlib.import_module(command.module).add_arguments(recorder)
        parts.append(f"## `megarlx {name}`\n\n{command.summary[0].upper()}{command.summary[1:]}.\n")
        if recorder.added:
            parts.append("\n| argument | what it is |\n|---|---|\n")
            parts += [argument_row(*one) for one in recorder.added]
        parts.append("\n")
    return "".join(parts)


def python_page() -> str:
    parts = [f"# Names of Python\n\n{NOTE}{inspect.getdoc(megarlx)}\n\n## `import megarlx`\n\n"]
    for name in megarlx.PUBLIC:
        named = getattr(megarlx, name)
        text = inspect.cleandoc(named.__doc__ or "")
        parts.append(f"### `megarlx.{name}`\n\n```python\n{name}{signature(named)}\n```\n\n")
        parts.append(f"```text\n{text}\n```\n\n")
    parts.append("## What `megarlx.open` gives\n\n")
    parts += [member_text(name, member) for name, member in public_members(OpenedRun)]
    parts.append("## What a configuration may name\n\n")
    parts.append("[extending.md](../extending.md) adds one of each.\n\n")
    parts.append("| kind | form of yours | ours |\n|---|---|---|\n")
    for kind, one in plug.KINDS.items():
        names = ", ".join(f"`{name}`" for name in one.ours) or "none"
        parts.append(f"| {kind} | {one.form}, or file.py in place of module | {names} |\n")
    return "".join(parts)


def public_members(kind: type) -> list[tuple[str, Any]]:
    """Properties and methods of its own, in the order in which they are written."""
    own = ((name, member) for name, member in vars(kind).items() if not name.startswith("_"))
    return [(n, m) for n, m in own if isinstance(m, property) or inspect.isfunction(m)]


def member_text(name: str, member: Any) -> str:
    if isinstance(member, property):
        kind = inspect.signature(member.fget or len).return_annotation
        head = f"{name}: {kind}"
    else:
        head = f"{name}{signature(member)}"
    text = inspect.cleandoc(member.__doc__ or "")
    shown = f"```text\n{text}\n```\n\n" if text else ""
    return f"### `run.{name}`\n\n```python\n{head}\n```\n\n{shown}"


def parameter_text(parameter: inspect.Parameter) -> str:
    text, default = f"{parameter.name}: {parameter.annotation}", parameter.default
    if default is parameter.empty:
        return text
    return f"{text} = {default.__name__ if inspect.isclass(default) else repr(default)}"


def signature(named: Any) -> str:
    """One parameter a line, where they are many."""
    whole = inspect.signature(named)
    returns = f" -> {whole.return_annotation}"
    given = [parameter for name, parameter in whole.parameters.items() if name != "self"]
    shown = [parameter_text(parameter) for parameter in given]
    star = next((i for i, p in enumerate(given) if p.kind is p.KEYWORD_ONLY), None)
    if star is not None:
        shown.insert(star, "*")
    inside = "".join(f"    {one},\n" for one in shown)
    return f"(\n{inside}){returns}"


PAGES: dict[str, Callable[[], str]] = {
    "reference/config.md": config_page,
    "reference/commands.md": commands_page,
    "reference/python.md": python_page,
    "pictures/architecture.svg": import_order.picture,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes docs/reference/.")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args().check
    stale = []
    for name, page in PAGES.items():
        path, text = DOCS / name, page().rstrip("\n") + "\n"
        if check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            stale.append(name)
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if stale:
        print(f"{', '.join(stale)}: run python tools/reference_pages.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
