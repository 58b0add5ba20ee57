"""docs/scaling.md: every command in it runs, and says what stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megarlx.cli import main

ROOT = Path(__file__).resolve().parents[3]
BLOCKS = re.findall(
    r"```text\n\$ megarlx (.*)\n((?:.*\n)*?)```", (ROOT / "docs/scaling.md").read_text()
)


def lines(text: str) -> list[str]:
    """Without trailing blanks, and without what the clock of a dry run says."""
    text = re.sub(r"built in.*?walked in\s+[\d.]+ s", "built and walked", text, flags=re.DOTALL)
    return [line.rstrip() for line in text.strip("\n").split("\n") if line.strip()]


def test_the_document_has_the_plans_it_promises() -> None:
    commands = [command for command, _ in BLOCKS]
    assert [re.search(r"--gpus (\d+)", command)[1] for command in commands] == [  # type: ignore[index]
        *("8", "64", "1024", "1024")
    ]
    assert "--dry-run" in commands[-1]


@pytest.mark.parametrize(("command", "shown"), BLOCKS, ids=[command for command, _ in BLOCKS])
def test_a_command_of_the_document_prints_what_stands_below_it(
    command: str,
    shown: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(command.split()) == 0
    assert lines(capsys.readouterr().out) == lines(shown)
