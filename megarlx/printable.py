"""Text that this program did not write, made safe to be shown: a model's, a run's, a judge's."""

from __future__ import annotations

import re
import sys

# What moves a terminal's cursor, turns the reading direction, ends a line unseen, or is no
# character: C0 and C1 controls but line feed and tab, bidirectional controls, separators, tags,
# surrogates, noncharacters.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    """With every hidden character written as its escape, `\\x1b`."""
    return HIDDEN.sub(lambda found: _escape(ord(found[0])), text)


def indented(text: str, spaces: int = 4) -> str:
    """As a block that Markdown shows as it stands: every line of it is indented."""
    return "\n".join(" " * spaces + line for line in printable(text).split("\n"))


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def complain(message: object) -> None:
    """An error, on standard error. It may quote a file of somebody else's."""
    print(printable(str(message)), file=sys.stderr)
