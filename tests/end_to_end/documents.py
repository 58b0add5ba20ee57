"""Commands as the documents show them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from training_runs import ROOT

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^(?: {4}.*)?\n)+", re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")
# What is a pattern of commands and none itself: RUN[@ITER], FILE…, <this repository>
PATTERN = re.compile(r"[\[…<]")
EXPLANATION = re.compile(r" {3,}")  # what follows in a column of its own
ENDS = {";", "&&", "|", ">", ">>", "&"}


@dataclass(frozen=True)
class Shown:
    """A command of `megarlx`, or of one of the tools, and where it stands."""

    document: Path
    line: str  # without what explains it
    before: tuple[str, ...]  # what launches it: torchrun with its options, say
    words: tuple[str, ...]  # behind `megarlx`, or the name of a tool and what is behind it

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}: {self.line[:70]}"

    @property
    def is_pattern(self) -> bool:
        quoted = re.findall(r"'([^']*)'", self.line)
        return any(PATTERN.search(word) for word in self.words if word not in quoted)


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


def shown(document: Path) -> list[Shown]:
    found = []
    for text in shell_lines(document):
        line = EXPLANATION.split(text.strip())[0]
        try:
            words = words_of(line)
        except ValueError:  # no command: text with an apostrophe
            continue
        for i, word in enumerate(words):
            behind = i + 1
            if word.endswith("mpirun.sh") and "--" in words[i:]:
                behind = words.index("--", i) + 1
            elif re.fullmatch(r"tools/\w+\.py", word) and words[i - 1] == "python":
                behind = i
            elif not (
                calls_megarlx(words, i) or (word.endswith("slurm.sbatch") and words[i + 1 :])
            ):
                continue
            said = until_the_end(words[behind:])
            if said:
                found.append(Shown(document, line, tuple(words[:behind]), said))
    return found


def words_of(line: str) -> list[str]:
    """As a shell splits them; what ends a command is a word."""
    split = shlex.shlex(line, posix=True, punctuation_chars=";&|>")
    split.whitespace_split = True
    return list(split)


def calls_megarlx(words: list[str], i: int) -> bool:
    """`megarlx …` at the start of a command, behind variables, or behind `-m`."""
    if words[i] == "megarlx" and i and words[i - 1] in ("-m", "-m]"):
        return True
    before = words[:i]
    begins = not before or before[-1] in ENDS or all("=" in word for word in before)
    begins = begins or before[-1] == "N]"  # [mpirun -n N] megarlx prepare
    return begins and words[i] in ("megarlx", ".venv/bin/megarlx")


def until_the_end(words: list[str]) -> tuple[str, ...]:
    """Up to the next command."""
    ends = [i for i, word in enumerate(words) if word in ENDS]
    return tuple(words[: ends[0]] if ends else words)
