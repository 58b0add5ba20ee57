"""Each rank's words are kept in a file of its own; the terminal, and its progress bar, stay."""

from __future__ import annotations

import io
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megarlx.run.rank_logs import log_path, rank_log

ROOT = Path(__file__).resolve().parents[3]
STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ")


def lines_of(path: Path) -> list[str]:
    """Without the stamps, which every line must have."""
    lines = path.read_text().splitlines()
    assert all(STAMP.match(line) for line in lines)
    return [STAMP.sub("", line, count=1) for line in lines]


def test_prints_go_to_the_terminal_and_to_the_ranks_own_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sys.stdout, sys.stderr
    with rank_log(tmp_path, 3) as log:
        print("step 1:", end=" ")
        print("loss 2.5")
        print("to the other stream", file=sys.stderr)
        print("\x1b[31mred\x1b[0m, and a last line without an end", end="")
    assert (sys.stdout, sys.stderr) == before
    assert log.path == log_path(tmp_path, 3) == tmp_path / "logs" / "rank_00003.log"
    first, *said = lines_of(log.path)
    assert first.startswith("--- rank 3 on ")
    assert f"process {os.getpid()}" in first
    assert said == [
        "step 1: loss 2.5",
        "to the other stream",
        "red, and a last line without an end",
        "--- ended",
    ]
    captured = capsys.readouterr()
    assert captured.out.startswith("step 1: loss 2.5\n\x1b[31mred")
    assert captured.err == "to the other stream\n"


def test_a_run_outlives_who_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `| tee`, which Ctrl-C ends at once, while the run has yet to save."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with rank_log(tmp_path, 0):
            print("step 1", flush=True)
            print("saved", flush=True)
    _, *said = lines_of(log_path(tmp_path, 0))
    assert said == ["step 1", "--- only this log is written now: Broken pipe", "saved", "--- ended"]


def test_a_second_start_appends_and_an_exception_is_kept_with_its_traceback(tmp_path: Path) -> None:
    with rank_log(tmp_path, 0):
        print("one")
    with pytest.raises(ZeroDivisionError), rank_log(tmp_path, 0):
        print(1 / 0)
    said = lines_of(log_path(tmp_path, 0))
    assert sum(line.startswith("--- rank 0 on ") for line in said) == 2
    assert said[1] == "one"
    assert said[-1] == "ZeroDivisionError: division by zero"
    assert "Traceback (most recent call last):" in said


def test_the_stream_itself_says_whether_it_is_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with rank_log(tmp_path, 0):
        assert sys.stderr.isatty()
        assert not sys.stdout.isatty()


PROGRAM = """
import sys, time
from pathlib import Path
from rich.console import Console
from rich.progress import Progress
from megarlx.run.rank_logs import rank_log

with rank_log(Path(sys.argv[1]), 0) as log:
    print("before")
    with Progress(console=Console(file=log.terminal)) as bar, log.beside_progress():
        task = bar.add_task("training", total=20)
        for step in range(20):
            bar.update(task, completed=step + 1, description=f"loss {step}")
            if step == 10:
                print("between")
            time.sleep(0.02)
    print("after")
"""


def test_a_progress_bar_moves_on_the_terminal_and_leaves_no_trace_in_the_log(
    tmp_path: Path,
) -> None:
    terminal, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        stdout=side,
        stderr=side,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
    )
    os.close(side)
    shown = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        shown += part
    os.close(terminal)
    assert process.wait() == 0, shown.decode()
    for word in (b"before", b"between", b"after", b"loss 19", b"\x1b[2K"):
        assert word in shown
    assert shown.count(b"between") == 1
    assert lines_of(log_path(tmp_path, 0))[1:] == ["before", "between", "after", "--- ended"]


def test_warnings_and_words_before_a_kill_are_there(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from megarlx.run.rank_logs import rank_log\n"
        "import warnings\n"
        "with rank_log(Path(sys.argv[1]), 1):\n"
        "    warnings.warn('a warning')\n"
        "    print('the last words')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    words = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert lines_of(log_path(tmp_path, 1))[1:] == [
        "<string>:6: UserWarning: a warning",
        "the last words",
    ]
