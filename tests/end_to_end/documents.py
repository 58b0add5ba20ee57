"""Commands as the documents show them."""

from __future__ import annotations

import re
from pathlib import Path

from training_runs import ROOT

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^(?: {4}.*)?\n)+", re.MULTILINE)


SPAN = re.compile(r"`([^`\n]+)`")


def documents() -> list[Path]:
    """What shows commands: the documents, and the comments of configurations."""
    return [
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "configs").rglob("*.toml")),
    ]


def fenced(document: Path, language: str) -> list[str]:
    """The contents of the blocks of a language, in order."""
    found = FENCE.findall(document.read_text(encoding="utf-8"))
    return [text for name, text in found if name == language]


def shell_lines(document: Path) -> list[str]:
    """Every line of every block of code, those that a backslash goes on with in one, and what is
    set as code inside a text."""
    text = document.read_text(encoding="utf-8")
    if document.suffix == ".toml":
        return re.findall(r"^# {3}(.*)$", text, re.MULTILINE)
    code = [content for _, content in FENCE.findall(text)]
    prose = FENCE.sub("", text)
    code += INDENTED.findall(prose)
    lines = [
        line.strip().removeprefix("$ ")
        for block in code
        for line in re.sub(r"\\\n\s*", "", block).splitlines()
    ]
    spans = SPAN.findall(INDENTED.sub("\n", prose))
    # `megarlx plan` alone is the name of a command.
    return lines + [span for span in spans if len(span.split()) > 2]
