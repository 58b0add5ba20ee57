"""A browser without a window, where one is installed: what a page has become once it has run."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FOUND = next((path for name in NAMES if (path := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(
    FOUND is None, reason=f"no browser is installed: none of {', '.join(NAMES)} is on PATH"
)


def opened(page: Path, address: str = "", *, width: int = 1400, milliseconds: int = 4000) -> str:
    """The page's elements as HTML, from a file without a server."""
    assert FOUND is not None
    with tempfile.TemporaryDirectory() as profile:
        words = [
            *(FOUND, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"),
            *(f"--window-size={width},900", f"--virtual-time-budget={milliseconds}", "--dump-dom"),
        ]
        made = subprocess.run(
            [*words, f"{page.resolve().as_uri()}{address}"],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    return made.stdout


def with_script(page: Path, copy: Path, script: str) -> Path:
    """A copy of the page beside it that runs a script too, in a file of its own."""
    copy.with_suffix(".js").write_text(script, encoding="utf-8")
    text = page.read_text(encoding="utf-8")
    made = text.replace("</head>", f'<script src="{copy.with_suffix(".js").name}"></script></head>')
    assert made != text
    copy.write_text(made, encoding="utf-8")
    return copy
