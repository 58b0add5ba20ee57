"""The walk done a tenth time: a demo that is made shorter, what a sweep says, checkpoints kept."""

from __future__ import annotations

import json
import time
from io import StringIO
from pathlib import Path

import pytest
from public_models import tiny_model
from rich.console import Console

from megarlx.cli import main
from megarlx.config import ConfigError
from megarlx.config.sweep import SweepConfig
from megarlx.study.demo import shipped_sweep
from megarlx.sweeps.plan import Job
from megarlx.sweeps.run import Progress, SweepRunner


def test_a_key_with_dots_in_it_is_set_in_quotes() -> None:
    """Keys of the trunk, in a sweep's own tables."""
    given = ['set."training.steps"=100', "set . 'optimizer.lr' = 1e-3", 'excursions.0.set."a=b"=1']
    sweep = shipped_sweep("demo", given)
    assert sweep.set == {"training.steps": 100, "optimizer.lr": 1e-3}
    assert sweep.excursions[0].set["a=b"] == 1
    for wrong in ("set.=1", ".jobs=1", "jobs", "=1", 'set."a=1', "set..a=1"):
        with pytest.raises(ConfigError, match="expected key=value"):
            shipped_sweep("demo", [wrong])


def sweep(tmp_path: Path, *progress: Progress) -> tuple[SweepRunner, StringIO]:
    said = StringIO()
    config = SweepConfig(out=str(tmp_path), trunk="base", jobs=2)
    runner = SweepRunner(config, [], console=Console(file=said))
    runner.all = {one.job.name: one for one in progress}
    return runner, said


def test_a_sweep_tells_the_step_of_an_excursion(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 20, "time": time.time()}) + "\n")
    words = ("branch", "base@latest", "sft.toml")
    runner, said = sweep(tmp_path, Progress(Job("sft", words, tmp_path, None), "running"))
    runner._told = -1e9
    runner._tell()
    assert said.getvalue() == "sft: step 20, 0 s\n"


def test_a_sweep_does_not_say_how_long_it_takes_where_a_run_is_longer_than_those_before(
    tmp_path: Path,
) -> None:
    done = Progress(Job("a", ("branch",), None, None), "done", seconds=60)
    running = Progress(Job("b", ("branch",), None, None), "running", seconds=30)
    waiting = Progress(Job("c", ("branch",), None, None), "waiting")
    runner, _ = sweep(tmp_path, done, running, waiting)
    assert runner._left() == ", about 0.8 minutes left"
    running.seconds = 90
    assert runner._left() == ""


RECIPE = """
[training]
sequence_length = 32
sequences_per_step = 1
[template]
user = "Q: {content} A:"
assistant = " {content}"
[sft]
conversations = "solved.jsonl"
[[stages]]
steps = 1
objectives = { sft = { lr = 1e-2 } }
[checkpoints]
save_every_steps = 4
keep_last = 1
"""


def test_checkpoints_to_be_kept_that_are_never_saved_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model(tmp_path / "hf")
    Path("solved.jsonl").write_text('{"question": "3 + 4?", "answer": "7"}\n')
    Path("sft.toml").write_text(RECIPE)
    for every, told in ((10, True), (8, False)):
        setting = f"checkpoints.keep_every_steps={every}"
        assert main(["branch", "hf", "sft.toml", "--out", f"sft{every}", "--set", setting]) == 0
        said = capsys.readouterr().out
        assert ("only those at multiples of 20 stay" in said) is told
        assert ("is no multiple of save_every_steps" in said) is told
