"""Every command that a document shows is one that the command line takes, and what it names exists.

Here commands are read, not run: docs/own_model.md is run whole by a test of its own, and the short
ones that need nothing are run at the end.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from documents import documents, shell_lines
from training_runs import ROOT

from megarlx.cli import COMMANDS, main
from megarlx.config import load_config
from megarlx.planning.command import planned_config

# What is a pattern of commands and none itself: RUN[@ITER], FILE…, <this repository>
PATTERN = re.compile(r"[\[…<]")
EXPLANATION = re.compile(r" {3,}")  # what follows in a column of its own
ENDS = {";", "&&", "|", ">", ">>", "&"}
OURS = ("configs/", "docs/", "tools/", "tests/", "benchmarks/")


@dataclass(frozen=True)
class Shown:
    document: Path
    line: str
    words: tuple[str, ...]  # behind `megarlx`, or the name of a tool and what is behind it

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}: {self.line[:70]}"


def shown(document: Path) -> list[Shown]:
    found = []
    for line in shell_lines(document):
        try:
            words = shlex.split(EXPLANATION.split(line.strip())[0], comments=True)
        except ValueError:  # no command: text with an apostrophe
            continue
        for i, word in enumerate(words):
            rest = words[i + 1 :]
            if calls_megarlx(words, i) or (word.endswith("slurm.sbatch") and rest):
                found.append(Shown(document, line, until_the_end(rest)))
            elif word.endswith("mpirun.sh") and "--" in rest:
                found.append(Shown(document, line, until_the_end(rest[rest.index("--") + 1 :])))
            elif re.fullmatch(r"tools/\w+\.py", word) and words[i - 1] == "python":
                found.append(Shown(document, line, until_the_end(words[i:])))
    return [one for one in found if one.words and not PATTERN.search(" ".join(one.words))]


def calls_megarlx(words: list[str], i: int) -> bool:
    """`megarlx …` at the start of a command, behind variables, or behind `-m`."""
    if words[i] == "megarlx" and i and words[i - 1] == "-m":
        return True
    before = words[:i]
    begins = not before or before[-1] in ENDS or all("=" in word for word in before)
    return begins and words[i] in ("megarlx", ".venv/bin/megarlx")


def until_the_end(words: list[str]) -> tuple[str, ...]:
    """Up to the next command."""
    ends = [i for i, word in enumerate(words) if word in ENDS]
    return tuple(words[: ends[0]] if ends else words)


ALL = [one for document in documents() for one in shown(document)]


def parse(words: tuple[str, ...]) -> argparse.Namespace | None:
    """As the real command line does; raises SystemExit where it refuses."""
    name, *rest = words
    if name.startswith("tools/"):
        spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if hasattr(module, "arguments"):
            module.arguments(rest)
        return None
    if name.startswith("-"):
        assert name in ("--help", "--version")
        return None
    assert name in COMMANDS, f"there is no command '{name}'"
    parser = argparse.ArgumentParser(prog=name, allow_abbrev=False)
    importlib.import_module(COMMANDS[name].module).add_arguments(parser)
    return parser.parse_args(rest)


@pytest.mark.parametrize("one", ALL, ids=str)
def test_a_documented_command_is_one_that_the_command_line_takes(
    one: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    try:
        parsed = parse(one.words)
    except SystemExit as refused:
        pytest.fail(f"{one.line}\nis refused (status {refused.code})")
    for word in one.words:
        if word.startswith(OURS):
            assert (ROOT / word).exists(), f"{one.line}\n{word} does not exist"
    config = getattr(parsed, "config", None)
    if getattr(parsed, "trunk", None) is not None:
        planned_config(parsed)
    elif one.words[0] in ("train", "plan", "config") and config and (ROOT / config).exists():
        load_config(config, getattr(parsed, "overrides", []))


def test_commands_are_found_in_every_form_that_the_documents_use() -> None:
    lines = [one.line for one in ALL]
    for part in ("torchrun ", "sbatch ", "mpirun.sh ", "mpirun -n", "srun ", "OMP_NUM_THREADS=1 "):
        assert any(part in line for line in lines), f"no command with {part!r} was found"
    commands = {one.words[0] for one in ALL}
    assert {
        "train",
        "branch",
        "evaluate",
        "generate",
        "sweep",
        "report",
        "tree",
        "plan",
    } <= commands
    assert {"doctor", "tools/convert_checkpoint.py", "tools/inspect_checkpoint.py"} <= commands
    assert len(ALL) > 40


def test_a_command_that_is_wrong_would_be_noticed() -> None:
    for line in ("branch RUN recipe.toml", "train a.toml --sett b=1", "tools/prepare_tokens.py a"):
        with pytest.raises(SystemExit):
            parse(tuple(line.split()))
    with pytest.raises(AssertionError):
        parse(("trian", "a.toml"))


@pytest.mark.parametrize(
    "document", [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"], ids=lambda p: p.name
)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_make_targets_that_are_shown_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z -]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    known = {name for names in targets for name in names.split()}
    asked = {
        match[1]
        for document in documents()
        for line in shell_lines(document)
        if (match := re.fullmatch(r"make ([a-z-]+).*", line.strip()))
    }
    assert asked
    assert asked <= known


@pytest.mark.parametrize(
    "one",
    [
        one
        for one in ALL
        if one.words[0] in ("--help", "--version")
        or {"--list", "--help-config"} & set(one.words)
        or "--slurm" in one.words
    ],
    ids=str,
)
def test_the_short_ones_that_need_nothing_run(
    one: Shown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    assert main(list(one.words)) == 0
