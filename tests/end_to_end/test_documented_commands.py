"""Every command that a document shows is one that the command line takes, and what it names exists.

Here commands are read, not run: test_documented_runs.py runs them.
"""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path

import pytest
from documents import Shown, documents, shell_lines, shown
from training_runs import ROOT, tool

from megarlx.cli import COMMANDS
from megarlx.config import load_config
from megarlx.planning.command import planned_config

OURS = ("configs/", "docs/", "tools/", "tests/", "benchmarks/")
ALL = [one for document in documents() for one in shown(document) if not one.is_pattern]


def parse(words: tuple[str, ...]) -> argparse.Namespace | None:
    """As the real command line does; raises SystemExit where it refuses."""
    name, *rest = words
    if name.startswith("tools/"):
        module = tool(Path(name).stem)
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
    assert {"doctor", "convert", "inspect"} <= commands
    assert len(ALL) > 40


def test_a_command_that_is_wrong_would_be_noticed() -> None:
    for line in ("branch RUN recipe.toml", "train a.toml --sett b=1", "prepare a"):
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
