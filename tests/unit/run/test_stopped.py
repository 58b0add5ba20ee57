"""A stopped run can be told from one that is done, whatever launched it."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megarlx.comm.groups import Group
from megarlx.run.stopped import SIGNALS, StopRequest, clear_mark, exit_code, mark_stopped

ROOT = Path(__file__).resolve().parents[3]
LISTEN = """
import os, signal, sys, time
from megarlx.run.stopped import StopRequest
stop = StopRequest(None)
with stop.listening():
    print("ready", flush=True)
    while not stop.reason:
        time.sleep(0.01)
    print("saving", flush=True)
    if sys.argv[1:]:
        open(sys.argv[1], "w").write(stop.reason)
    else:
        os.kill(os.getpid(), signal.SIGINT)
        print("still here", flush=True)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_asks_and_what_schedulers_repeat_changes_nothing(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "isatty", lambda _: False)
    before = [signal.getsignal(one) for one in SIGNALS]
    stop, world = StopRequest(None), Group.alone("world")
    with stop.listening():
        assert not stop.agreed(world)
        for again in (number, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            os.kill(os.getpid(), again)
            assert stop.agreed(world)
            assert stop.reason == number.name
    assert [signal.getsignal(one) for one in SIGNALS] == before
    said = capfd.readouterr().err
    assert said.count("then the run is saved") == (number != signal.SIGHUP)  # nobody is there


def test_a_signal_that_is_switched_off_stays_so_as_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopRequest(None)
        with stop.listening():
            os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.reason
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_second_ctrl_c_ends_at_once() -> None:
    words = [sys.executable, "-c", LISTEN]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        said, warned = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert said == "saving\n"
    assert "Ctrl-C now ends it at once, without saving" in warned


def test_a_closed_terminal_is_asked_by_and_not_died_of(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    child, terminal = pty.fork()
    if child == 0:
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", LISTEN, str(saved)])
    said = b""
    while b"ready" not in said:
        said += os.read(terminal, 1024)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert saved.read_text() == "SIGHUP"


def test_the_mark_says_why_and_where_and_goes_when_the_run_goes_on(tmp_path: Path) -> None:
    clear_mark(tmp_path)  # there is none yet
    mark_stopped(tmp_path, "SIGTERM", 12)
    mark_stopped(tmp_path, "stop_after_minutes", 20)
    text = (tmp_path / "stopped.json").read_text()
    assert json.loads(text) == {"reason": "stop_after_minutes", "step": 20}
    clear_mark(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("launcher", ["none", "openmpi", "slurm"])
def test_launchers_that_hand_the_code_on_get_it(launcher: str) -> None:
    assert exit_code(launcher) == 75


def test_torchrun_neither_hands_a_code_on_nor_leaves_it_alone(tmp_path: Path) -> None:
    """Why it gets 0: with 75 it starts the workers again, and says 1 itself."""
    program = tmp_path / "program.py"
    program.write_text("print('started', flush=True)\nraise SystemExit(75)\n")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    words += ["--max-restarts=1", "--monitor-interval=0.1", str(program)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("started")) == (1, 2)
    assert exit_code("torchrun") == 0
