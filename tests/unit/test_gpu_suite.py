"""benchmarks/gpu_suite.py where there is no GPU: its pieces, its time, its results."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import gpu_suite
from gpu.pieces import Absent, Context, Failed, Piece, call, gated, python, write_json


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def pieces(*seconds: float) -> list[Piece]:
    return [Piece(f"p{i}", s, lambda context: {}) for i, s in enumerate(seconds)]


def run(
    given: list[Piece], takes: float, budget: float, before: dict[str, Any] | None = None
) -> tuple[list[dict[str, Any]], list[tuple[str, float]]]:
    clock, begun = Clock(), []

    def start(piece: Piece, limit: float) -> dict[str, Any]:
        begun.append((piece.name, limit))
        clock.now += takes
        return {"status": "done"}

    saved: list[list[dict[str, Any]]] = []
    found = gpu_suite.run_pieces(
        given, before or {}, start, saved.append, budget_seconds=budget, clock=clock
    )
    assert saved[-1] == found
    return found, begun


def test_list_shows_every_stage_and_needs_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--list"])
    assert gpu_suite.main() == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {line[0] for line in lines} == set(gpu_suite.STAGES)
    names = [line[1] for line in lines]
    assert len(set(names)) == len(names)
    assert all(name.replace("_", "").replace("-", "").isalnum() for name in names)  # file names
    for stage in gpu_suite.STAGES:  # no piece is too long for the stage that begins with it
        assert all(p.seconds <= gpu_suite.BUDGET_SECONDS for p in gpu_suite.pieces_of(stage))


def test_a_piece_that_may_not_fit_is_left_and_a_shorter_one_still_begun() -> None:
    found, begun = run(pieces(40, 80, 30), takes=50, budget=100)
    assert [p["status"] for p in found] == ["done", "not run", "done"]
    assert found[1]["reason"] == "50 s left, it may need 80 s"
    assert begun == [("p0", 80), ("p2", 50)]


def test_no_piece_gets_more_than_is_left_of_the_stage() -> None:
    _, begun = run(pieces(90), takes=50, budget=100)
    assert begun == [("p0", 100)]


def test_what_is_done_is_kept_and_what_failed_is_tried_again() -> None:
    before = {
        "p0": {"name": "p0", "status": "done", "result": {"rows": [1]}},
        "p1": {"name": "p1", "status": "failed"},
        "p2": {"name": "p2", "status": "failed"},
    }
    found, begun = run(pieces(10, 10, 1000), takes=1, budget=100, before=before)
    assert [name for name, _ in begun] == ["p1"]
    assert [p["status"] for p in found] == ["done", "done", "failed"]
    assert found[0]["result"] == {"rows": [1]}


@pytest.mark.parametrize(
    ("what", "status"),
    [(Absent("no tool"), "absent"), (Failed("wrong", {"rows": []}), "failed"), (None, "done")],
)
def test_the_result_of_a_piece_says_what_became_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: Exception | None, status: str
) -> None:
    def work(context: Context) -> dict[str, Any]:
        assert context.small
        assert context.seconds_left() > 0
        if what is not None:
            raise what
        return {"rows": [gated({"ratio": 0.5}, 0.8)]}

    monkeypatch.setattr(gpu_suite, "pieces_of", lambda stage: [Piece("p", 1, work)])
    options = argparse.Namespace(
        device="cpu", stage="ops", piece="p", limit=9.0, small=True, out=tmp_path
    )
    options.result = tmp_path / "p.json"
    assert gpu_suite.run_piece(options) == (status == "failed")
    result = json.loads(options.result.read_text())
    assert result["status"] == status
    if what is None:  # a tiny size passes no gate and misses none
        assert result["result"]["rows"] == [{"ratio": 0.5}]
    else:
        assert result["reason"] == str(what)


def test_an_error_in_a_piece_is_written_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(context: Context) -> dict[str, Any]:
        return {"rows": [1 / 0]}

    monkeypatch.setattr(gpu_suite, "pieces_of", lambda stage: [Piece("p", 1, work)])
    options = argparse.Namespace(
        device="cpu", stage="ops", piece="p", limit=9.0, small=True, out=tmp_path
    )
    options.result = tmp_path / "p.json"
    assert gpu_suite.run_piece(options) == 1
    assert json.loads(options.result.read_text())["reason"].startswith("ZeroDivisionError")
    assert "Traceback" in capsys.readouterr().err


def test_a_process_past_its_limit_is_ended_with_the_processes_it_started() -> None:
    program = "import subprocess, sys; print('begun', flush=True); "
    program += "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    begun = time.monotonic()
    code, output = call(python("-c", program), 2.0)
    assert code is None
    assert "begun" in output
    assert time.monotonic() - begun < 15


def test_rows_tell_whether_their_gate_is_met() -> None:
    assert gated({"ratio": 0.81}, 0.8)["met"] is True
    assert gated({"ratio": 0.79}, 0.8)["met"] is False
    assert "met" not in gated({"ratio": 0.1}, 0.8, applies=False)


def test_a_table_names_gates_and_what_was_not_run(tmp_path: Path) -> None:
    row = {"name": "n", "size": "s", "ours": 1.0, "baseline": 2.0, "baseline_name": "copy"}
    row |= {"unit": "GB/s", "ratio": 0.5}
    found = [
        {"name": "a", "status": "done", "seconds": 1.0, "result": {"rows": [gated(row, 0.8)]}},
        {"name": "b", "status": "not run", "reason": "3 s left | it may need 9 s"},
    ]
    text = gpu_suite.table(found, {"gpu": "none"})
    assert "| n | s | 1 | 2 | copy | GB/s | 0.5 | 0.8 | missed |" in text
    assert "| b | not run |  | 3 s left / it may need 9 s |" in text


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": 1})
    write_json(path, {"device": torch.device("cpu")})
    assert json.loads(path.read_text()) == {"device": "cpu"}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_times_of_a_call_are_medians_of_calls_with_rotating_inputs() -> None:
    from gpu.clock import fitted, interleaved

    seen: list[int] = []
    seconds = interleaved({"f": seen.append, "g": lambda i: None}, torch.device("cpu"), rounds=4)
    assert set(seconds) == {"f", "g"}
    assert seen[-4:] == [0, 1, 2, 3]
    line = fitted([1.0, 2.0, 3.0], [5.0, 7.0, 9.0])
    assert line["a"] == pytest.approx(3)
    assert line["b"] == pytest.approx(2)
    assert line["largest_miss"] == pytest.approx(0, abs=1e-12)
