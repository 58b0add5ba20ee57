"""`megarlx chat` with a run that was trained: as a script uses it, and at a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_runs import environment, train

import megarlx
from megarlx.cli import main

QUESTION = "ann has 7 books"


@pytest.fixture(scope="module")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("chat") / "run"
    longer = ("training.steps=2", "model.max_sequence_length=4000")
    assert train(config, out, *longer) == 0
    return out


def test_a_script_gets_what_the_run_generates(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    limits = ("--max-new-tokens", "12", "--seed", "3")
    with megarlx.open(str(trained)) as run:
        plain = run.template is None
        (expected,) = run.generate([QUESTION], samples=2, max_new_tokens=12, seed=3)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{QUESTION}\n")
    capsys.readouterr()
    words = ["chat", str(trained), "--prompts", str(prompts), "--samples", "2", *limits]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"prompt": QUESTION, "answers": expected}
    assert "at step 2: olmo2" in shown.err
    assert ("each text is given as it stands" in shown.err) is plain
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n"))
    assert main(["chat", str(trained), *limits]) == 0
    assert capsys.readouterr().out == expected[0] + "\n"


def test_what_cannot_be_opened_or_asked_is_an_error_in_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", str(tmp_path / "none")]) == 1
    assert "megarlx chat: " in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text('{"text": 1}\n')
    assert main(["chat", str(trained), "--prompts", str(tmp_path / "bad.jsonl")]) == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith(f"megarlx chat: {tmp_path / 'bad.jsonl'}, line 1: expected a text")


class Terminal:
    """The command at a terminal of its own."""

    def __init__(self, *words: str) -> None:
        self.end, other = pty.openpty()
        command = [sys.executable, "-m", "megarlx", "chat", *words]
        self.process = subprocess.Popen(
            command,
            stdin=other,
            stdout=other,
            stderr=other,
            env={**environment(), "TERM": "xterm", "COLUMNS": "100"},
            start_new_session=True,
        )
        os.close(other)
        self.seen = ""

    def until(self, text: str) -> None:
        limit = time.monotonic() + 120
        while text not in self.seen:
            assert time.monotonic() < limit, f"{text!r} not in {self.seen!r}"
            if select.select([self.end], [], [], 1)[0]:
                self.seen += os.read(self.end, 4096).decode(errors="replace")
        self.seen = self.seen.partition(text)[2]

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def interrupt_where_it_asks(self) -> None:
        """Python's input, between its prompt and its waiting, would hear of it at the next key."""
        self.until("> ")
        time.sleep(0.5)
        self.interrupt()

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)


@pytest.mark.parametrize("samples", [1, 3])
def test_ctrl_c_stops_an_answer_and_a_second_one_ends(trained: Path, samples: int) -> None:
    words = ("--max-new-tokens", "3000", "--samples", str(samples), "--raw")
    terminal = Terminal(str(trained), *words, "--set", "training.device=cpu")
    try:
        terminal.until("/help lists")
        terminal.until("> ")
        terminal.type(QUESTION + "\n")
        terminal.until("[3]" if samples == 3 else QUESTION)
        for _ in range(3):  # behind what the terminal echoes, the answer's first words
            terminal.until(" ")
        terminal.interrupt()
        terminal.until("(stopped)")
        terminal.until("> ")
        terminal.type("/help\n")  # whatever is typed, the next one is a first one again
        terminal.until("/take N")
        terminal.interrupt_where_it_asks()
        terminal.until("Ctrl-C once more")
        terminal.interrupt_where_it_asks()
        assert terminal.process.wait(60) == 130
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.end)
