"""The mechanism of benchmarks/gpu_suite.py with pieces made up here: forks, limits, the archive."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from gpu.pieces import Absent, Context, Failed, Piece, call, gated, note, python, write_json
from gpu.runner import Runner, Screen, Turn, table, turns

LINE = {"name": "n", "size": "s", "ours": 1.0, "baseline": 2.0, "baseline_name": "copy"}
LINE |= {"unit": "GB/s", "ratio": 0.5}


def runner_in(folder: Path, *, small: bool = True, **options: Any) -> Runner:
    (folder / "out").mkdir(exist_ok=True)
    about = {"gpu": "none"}
    return Runner(torch.device("cpu"), small, folder / "out", folder / "work", about, **options)


def alone(*pieces: Piece) -> list[Turn]:
    return [Turn((piece,), piece.limit) for piece in pieces]


def piece(name: str, run: Callable[[Context], Any], seconds: float = 5) -> Piece:
    return Piece(name, seconds, run)


def well(context: Context) -> dict[str, Any]:
    note("all is well")
    return {"rows": [gated(dict(LINE), 0.8)]}


def slow(context: Context) -> dict[str, Any]:
    note("begun")
    time.sleep(60)
    return {}


def members(archive: Path) -> dict[str, str]:
    with tarfile.open(archive) as tar:
        return {m.name: tar.extractfile(m).read().decode() for m in tar.getmembers()}  # type: ignore[union-attr]


def test_a_piece_runs_in_a_process_of_its_own_and_its_log_is_archived(tmp_path: Path) -> None:
    runner = runner_in(tmp_path)
    seen: list[int] = []
    assert runner.run(alone(piece("a", lambda c: seen.append(1) or well(c))), 60)
    assert seen == []  # in the child alone
    result = runner.results["a"]
    assert result["status"] == "done"
    assert "met" not in result["result"]["rows"][0]  # a tiny size passes no gate and misses none
    held = members(tmp_path / "out" / "logs.tar.gz")
    assert held["logs/a.log"].splitlines()[0] == "NOTE all is well"
    assert json.loads(held["results.json"])["pieces"] == [result]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "logs.tar.gz",
        "results.json",
        "results.md",
    ]


def test_at_full_size_a_row_tells_whether_its_gate_is_met(tmp_path: Path) -> None:
    runner = runner_in(tmp_path, small=False)
    runner.run(alone(piece("a", well)), 60)
    assert "| n | s | 1 | 2 | copy | GB/s | 0.5 | 0.8 | missed |" in table(
        list(runner.results.values()), {}
    )
    log = members(tmp_path / "out" / "logs.tar.gz")["logs/a.log"]
    assert "ROW n | s | 1 against 2 GB/s of copy | 0.500, gate 0.8: missed" in log


def raising(error: BaseException) -> Callable[[Context], Any]:
    def run(context: Context) -> Any:
        note("as far as it came")
        raise error

    return run


def test_what_became_of_each_piece_is_written_down_and_the_next_still_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = runner_in(tmp_path)
    given = [
        piece("absent", raising(Absent("no tool"))),
        piece("failed", raising(Failed("wrong", {"rows": [], "found": 3}))),
        piece("broken", raising(ZeroDivisionError("by nothing"))),
        piece("gone", lambda c: sys.exit(7)),
        piece("late", slow, seconds=1),
        piece("well", well),
    ]
    begun = time.monotonic()
    wanted = [
        Turn(turn.pieces, 1.0 if turn.pieces[0].name == "late" else 9) for turn in alone(*given)
    ]
    assert not runner.run(wanted, 100)
    assert time.monotonic() - begun < 30
    found = runner.results
    assert [r["status"] for r in found.values()] == [
        *("absent", "failed", "failed", "failed", "timed out", "done"),
    ]
    assert found["failed"]["result"]["found"] == 3
    assert found["broken"]["reason"] == "ZeroDivisionError: by nothing"
    assert found["gone"]["reason"] == "the process ended with 1"
    held = members(tmp_path / "out" / "logs.tar.gz")
    assert {f"logs/{p.name}.log" for p in given} <= held.keys()
    assert "Traceback" in held["logs/broken.log"]
    assert "begun" in held["logs/late.log"]
    shown = capsys.readouterr().out
    assert "== late: timed out" in shown
    assert "NOTE begun" in shown  # what it found before it was ended


def test_there_is_an_archive_after_every_piece(tmp_path: Path) -> None:
    runner = runner_in(tmp_path)
    archive = tmp_path / "out" / "logs.tar.gz"

    def look(context: Context) -> dict[str, Any]:
        return {"before": sorted(members(archive)) if archive.exists() else []}

    runner.run(alone(piece("a", look), piece("b", look), piece("c", look)), 60)
    results = ["results.json", "results.md"]
    assert [r["result"]["before"] for r in runner.results.values()] == [
        [],
        ["logs/a.log", *results],
        ["logs/a.log", "logs/b.log", *results],
    ]


def test_pieces_side_by_side_run_at_the_same_time_and_are_ended_each_by_itself(
    tmp_path: Path,
) -> None:
    def meet(own: str, other: str) -> Callable[[Context], Any]:
        def run(context: Context) -> dict[str, Any]:
            (context.work / own).touch()
            while not (context.work / other).exists():
                time.sleep(0.01)
            return {}

        return run

    runner = runner_in(tmp_path)
    together = Turn((piece("a", meet("a", "b")), piece("b", meet("b", "a")), piece("c", slow)), 5.0)
    assert not runner.run([together], 60)
    assert [r["status"] for r in runner.results.values()] == ["done", "done", "timed out"]


def test_a_piece_that_may_not_fit_is_left_and_a_shorter_one_still_begun(tmp_path: Path) -> None:
    runner = runner_in(tmp_path)
    assert runner.run(alone(piece("a", well), piece("b", well, 300), piece("c", well)), 100)
    assert [r["status"] for r in runner.results.values()] == ["done", "not run", "done"]
    assert runner.results["b"]["reason"].endswith("s left, 300 s expected")


def test_no_piece_gets_more_than_is_left(tmp_path: Path) -> None:
    runner = runner_in(tmp_path)

    def left(context: Context) -> dict[str, Any]:
        return {"left": context.seconds_left()}

    runner.run([Turn((piece("a", left),), 500.0)], 50)
    assert 0 < runner.results["a"]["result"]["left"] < 50


def test_what_is_done_is_kept_and_what_failed_is_tried_again(tmp_path: Path) -> None:
    before = {
        "a": {"name": "a", "status": "done", "result": {"rows": [], "kept": 1}},
        "b": {"name": "b", "status": "failed"},
    }
    runner = runner_in(tmp_path, results=before)
    assert runner.run(alone(piece("a", slow), piece("b", well)), 60)
    assert runner.results["a"]["result"]["kept"] == 1
    assert runner.results["b"]["status"] == "done"


def test_an_injected_failure_and_an_injected_hang_take_the_place_of_a_piece(tmp_path: Path) -> None:
    runner = runner_in(tmp_path, injected={"a": "fail", "b": "hang"})
    runner.run([Turn((piece(name, well),), 1.0) for name in "abc"], 60)
    assert [r["status"] for r in runner.results.values()] == ["failed", "timed out", "done"]
    assert runner.results["a"]["reason"] == "RuntimeError: injected"


def test_what_a_piece_needs_of_a_card_is_absent_on_a_cpu(tmp_path: Path) -> None:
    runner = runner_in(tmp_path)
    assert runner.run(alone(Piece("a", 5, slow, needs="flash-attn")), 60)
    assert runner.results["a"]["status"] == "absent"
    assert runner.results["a"]["reason"] == "not on a CPU: flash-attn"


def test_the_screen_is_never_given_more_than_its_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    screen = Screen(3000)
    for to_come in reversed(range(20)):
        screen.tell(f"== piece {to_come}: done", "x" * 4000, to_come)
    screen.tell("the end")
    shown = capsys.readouterr().out
    assert len(shown) <= 3000
    assert shown.endswith("the end\n")
    assert all(f"== piece {i}: done" in shown for i in range(20))
    assert shown.count("x") > 1500


def test_words_name_pieces_limits_and_what_runs_side_by_side() -> None:
    known = {name: Piece(name, 20, well) for name in ("a", "b", "c")}
    found = turns(["a", "b+c:90.5"], known)
    assert [[p.name for p in turn.pieces] for turn in found] == [["a"], ["b", "c"]]
    assert [turn.limit for turn in found] == [40, 90.5]
    for wrong, words in (
        ("there is no piece d; allowed: a, b, c", ["a+d"]),
        ("the limit is 'soon'", ["a:soon"]),
        ("a: named more than once", ["a", "b+a"]),
    ):
        with pytest.raises(ValueError, match=wrong):
            turns(words, known)


def still_running(mark: str) -> bool:
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return any(mark in line for line in listed.stdout.splitlines())


def test_a_piece_past_its_limit_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    mark = f"mark-{time.monotonic_ns()}"
    inner = ["-c", "import time; time.sleep(60)", mark]

    def start(context: Context) -> dict[str, Any]:
        # In a session of its own, as runs and reward workers are.
        process = subprocess.Popen([sys.executable, *inner], start_new_session=True)
        note("started")
        process.wait()
        return {}

    runner = runner_in(tmp_path)
    runner.run([Turn((piece("a", start),), 2.0)], 60)
    assert runner.results["a"]["status"] == "timed out"
    assert "started" in members(tmp_path / "out" / "logs.tar.gz")["logs/a.log"]
    time.sleep(0.2)
    assert not still_running(mark)


def test_a_command_past_its_limit_is_ended_with_the_processes_it_started() -> None:
    mark = f"mark-{time.monotonic_ns()}"
    program = "import subprocess, sys; print('begun', flush=True); "
    program += f"subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)', '{mark}'])"
    begun = time.monotonic()
    code, output = call(python("-c", program), 5.0)
    assert code is None
    assert "begun" in output
    assert time.monotonic() - begun < 20
    assert not still_running(f"time.sleep(60) {mark}")


def test_rows_tell_whether_their_gate_is_met() -> None:
    assert gated({"ratio": 0.81}, 0.8)["met"] is True
    assert gated({"ratio": 0.79}, 0.8)["met"] is False
    assert "met" not in gated({"ratio": 0.1}, 0.8, applies=False)


def test_a_table_tells_what_was_not_run() -> None:
    left = {"name": "b", "status": "not run", "reason": "3 s left | 9 s expected"}
    assert "| b | not run |  | 3 s left / 9 s expected |" in table([left], {"gpu": "none"})


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": 1})
    write_json(path, {"device": torch.device("cpu")})
    assert json.loads(path.read_text()) == {"device": "cpu"}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]
