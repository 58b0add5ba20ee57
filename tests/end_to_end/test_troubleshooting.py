"""docs/troubleshooting.md: every message in it is one that the code can print."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest
from training_runs import ROOT

DOCUMENT = ROOT / "docs" / "troubleshooting.md"
ROW = re.compile(r"^\| `([^`]+)`", re.MULTILINE)
# What other programs say, or no message at all.
NOT_OURS = ("Exit status 75", "CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED", "EADDRINUSE")


def text_of(node: ast.expr) -> str | None:
    """A string as the source writes it, `…` for every value put into it."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        parts = (text_of(v) if isinstance(v, ast.Constant) else "…" for v in node.values)
        return "".join(part or "" for part in parts)
    return None


@cache
def texts() -> list[str]:
    found = []
    for folder in ("megarlx", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.expr) and (text := text_of(node)):
                    found.append(text)
    return found


def known(message: str) -> bool:
    pieces = [piece.strip() for piece in message.split("…") if piece.strip()]
    pattern = re.compile(".*".join(re.escape(piece) for piece in pieces), re.DOTALL)
    return any(pattern.search(text) for text in texts())


MESSAGES = [m for m in ROW.findall(DOCUMENT.read_text(encoding="utf-8")) if m not in NOT_OURS]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_documented_message_is_in_the_code(message: str) -> None:
    assert known(message), f"no error of the code says {message!r}"


def test_there_are_many_and_one_that_is_not_there_would_be_noticed() -> None:
    assert len(MESSAGES) > 35
    assert not known("the … is made of cheese")
