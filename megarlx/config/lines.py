"""Tells on which line of a TOML text each key stands, for error messages.

tomllib reads the values but forgets the places; this scanner reads only the places. It is given
text that tomllib has accepted, so it need not judge it: it follows tables, arrays of tables, dotted
keys and inline tables, and steps over strings and comments.
"""

from __future__ import annotations

import re
import tomllib

Path = tuple[str | int, ...]

BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"""(?:"{0,2})'
    r"|'''.*?'''(?:'{0,2})"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)
NOTHING = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")  # blanks, line ends and comments
BLANK = re.compile(r"[ \t]*")
PLAIN_VALUE = re.compile(r"[^,\]}#\n]*")  # a number, a date or a boolean


def line_numbers(text: str) -> dict[Path, int]:
    """The line, from 1, where each table, key and array element is first named."""
    return _Scanner(text).run()


class _Scanner:
    def __init__(self, text: str) -> None:
        # As tomllib does, or a lone \r\n inside a string would shift what follows.
        self.text = text.replace("\r\n", "\n")
        self.at = 0
        self.line = 1
        self.counted_to = 0
        self.lines: dict[Path, int] = {}
        self.tables_in_array: dict[Path, int] = {}

    def run(self) -> dict[Path, int]:
        table: Path = ()
        self.skip(NOTHING)
        while self.at < len(self.text):
            if self.text.startswith("[[", self.at):
                table = self.array_header()
            elif self.text[self.at] == "[":
                self.at += 1
                table = self.name(self.key(), ())
                self.at += 1
            else:
                self.key_and_value(table)
            self.skip(NOTHING)
        return self.lines

    def skip(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self.text, self.at)
        if found is None:
            raise ValueError(
                f"line {self._line()}: not TOML: {self.text[self.at : self.at + 20]!r}"
            )
        self.at = found.end()
        return found.group()

    def _line(self) -> int:
        self.line += self.text.count("\n", self.counted_to, self.at)
        self.counted_to = self.at
        return self.line

    def key(self) -> tuple[str, ...]:
        """A dotted key, with the blanks around it."""
        parts = []
        while True:
            self.skip(BLANK)
            if self.text[self.at] in "\"'":
                quoted = self.skip(STRING)
                parts.append(tomllib.loads(f"key = {quoted}")["key"])
            else:
                parts.append(self.skip(BARE_KEY))
            self.skip(BLANK)
            if not self.text.startswith(".", self.at):
                return tuple(parts)
            self.at += 1

    def name(self, key: tuple[str, ...], inside: Path) -> Path:
        """Marks the line of a key and of the tables on the way to it."""
        path = inside
        for part in key:
            if path in self.tables_in_array:  # `[a.b]` after `[[a]]` means the last a
                path = (*path, self.tables_in_array[path] - 1)
            path = (*path, part)
            self.lines.setdefault(path, self._line())
        return (*path, self.tables_in_array[path] - 1) if path in self.tables_in_array else path

    def array_header(self) -> Path:
        self.at += 2
        *before, last = self.key()
        path = (*self.name(tuple(before), ()), last)
        self.lines.setdefault(path, self._line())
        count = self.tables_in_array.get(path, 0)
        self.tables_in_array[path] = count + 1
        self.lines[(*path, count)] = self._line()
        self.at += 2
        return (*path, count)

    def key_and_value(self, table: Path) -> None:
        path = self.name(self.key(), table)
        self.at += 1  # =
        self.skip(BLANK)
        self.value(path)

    def value(self, path: Path) -> None:
        opening = self.text[self.at]
        if opening in "\"'":
            self.skip(STRING)
        elif opening == "[":
            self.elements(path, "]")
        elif opening == "{":
            self.elements(path, "}")
        else:
            self.skip(PLAIN_VALUE)

    def elements(self, path: Path, closing: str) -> None:
        """What stands between brackets or braces: values, or keys and values."""
        self.at += 1
        count = 0
        self.skip(NOTHING)
        while self.text[self.at] != closing:
            if closing == "]":
                self.lines[(*path, count)] = self._line()
                self.value((*path, count))
            else:
                self.key_and_value(path)
            count += 1
            self.skip(NOTHING)
            if self.text[self.at] == ",":
                self.at += 1
                self.skip(NOTHING)
        self.at += 1
