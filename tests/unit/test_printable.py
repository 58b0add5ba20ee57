"""Foreign text is shown, never obeyed: by a terminal, by Markdown, by the reading direction."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarlx.printable import complain, indented, printable
from megarlx.run.screen import Screen


@given(st.text())
def test_no_control_or_direction_character_is_left_and_lines_stay(text: str) -> None:
    shown = printable(text)
    for character in shown:
        assert character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs")
        assert unicodedata.bidirectional(character) not in {
            "LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI",
        }  # fmt: skip
    assert shown.splitlines() == shown.removesuffix("\n").split("\n") or not shown
    assert shown.count("\n") == text.count("\n")
    assert printable(shown) == shown


@pytest.mark.parametrize("text", ["plain", "é✓ 東京 עברית العربية", "a\tb\n c", "👍🏽"])
def test_text_of_any_language_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("over\rwritten", "over\\x0dwritten"),
        ("\x9b31m", "\\x9b31m"),
        ("\ud800", "\\ud800"),
    ],
)
def test_what_a_terminal_would_obey_is_written_out(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_every_line_of_a_block_is_indented() -> None:
    block = indented("one\n<img src=x>\r<b>\u2028# heading")
    assert block.split("\n") == ["    one", "    <img src=x>\\x0d<b>\\u2028# heading"]
    assert all(line.startswith("    ") for line in block.splitlines())


def test_an_error_that_quotes_a_strangers_file_is_said_safely(
    capsys: pytest.CaptureFixture[str],
) -> None:
    complain(ValueError("key '\x1b[31m' is unknown"))
    assert capsys.readouterr().err == "key '\\x1b[31m' is unknown\n"


def test_samples_on_the_board_are_shown_line_by_line_and_never_rendered() -> None:
    class Board:
        text_written = ""

        def text(self, step: int, key: str, text: str) -> None:
            self.text_written = text

    board = Board()
    screen = Screen(board, None, 4)  # type: ignore[arg-type]
    bad = "one\n<img src=x onerror=alert(1)>\n# heading\r\x1b[2J\u202e"
    sample = {"prompt": bad, "completion": bad, "reference": bad, "reward": 1, "finish_reason": bad}
    screen.show(1, "samples/rl", [sample, sample])
    lines = board.text_written.splitlines()
    assert len(lines) > 20
    assert all(line.startswith("    ") for line in lines)
    assert not any(character in board.text_written for character in "\r\x1b\u202e")
