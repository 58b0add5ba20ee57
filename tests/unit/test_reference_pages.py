"""The reference pages say what the code says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from megarlx.cli import COMMANDS
from megarlx.config.describe import field_lines
from megarlx.config.sections import Config

ROOT = Path(__file__).resolve().parents[2]


sys.path.insert(0, str(ROOT / "tools"))


def tool() -> Any:
    spec = importlib.util.spec_from_file_location("pages", ROOT / "tools" / "reference_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_pages_are_current() -> None:
    made = tool()
    for name, page in made.PAGES.items():
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert text == page().rstrip("\n") + "\n", f"{name}: run python tools/reference_pages.py"
    written = {f"reference/{path.name}" for path in made.FOLDER.iterdir()}
    assert written == {name for name in made.PAGES if name.startswith("reference/")}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_part(name: str) -> None:
    assert f"\n## `megarlx {name}`\n" in (ROOT / "docs/reference/commands.md").read_text()


def test_every_key_has_its_row() -> None:
    text = (ROOT / "docs/reference/config.md").read_text()
    for line in field_lines(Config):
        inside, _, key = line.name.rpartition(".")
        part = text.split(f"\n### [{inside}]\n" if inside else "\n### Outside of any table\n")[1]
        assert f"\n| `{key}` |" in part.split("\n### ")[0]
