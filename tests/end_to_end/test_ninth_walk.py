"""The walk done a ninth time: sweeps that are changed, stopped, or hold mistakes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from public_models import tiny_model
from rich.console import Console

from megarlx.checkpoint import CheckpointError
from megarlx.cli import main
from megarlx.config import load_config
from megarlx.config.reward import RewardConfig
from megarlx.config.sweep import SweepConfig
from megarlx.rollouts.rewards.process import RewardPool
from megarlx.rollouts.rewards.sample import Sample
from megarlx.run.overlap import not_looked_at
from megarlx.sweeps.plan import Job, jobs_of
from megarlx.sweeps.run import Progress, SweepRunner

RECIPE = """
[training]
sequence_length = 64
sequences_per_step = 1
[template]
user = "Q: {content} A:"
assistant = " {content}"
[sft]
conversations = "solved.jsonl"
[[stages]]
steps = 2
objectives = { sft = { lr = 1e-2 } }
"""
SWEEP = """
out = "sweep"
trunk = "base"
suites = "suites.toml"
evaluate = ["latest"]
[[excursions]]
recipes = ["sft.toml"]
[[excursions]]
recipes = ["later.toml"]
runs = ["sft-at-latest"]
"""
SUITES = """
[[suites]]
name = "picked"
kind = "choice"
path = "picked.jsonl"
[[suites]]
name = "asked"
kind = "pass_at_k"
templated = false
path = "solved.jsonl"
samples = 2
ks = [1]
max_new_tokens = 4
"""
# In place of megarlx: writes down what it was told, and makes the run's folder.
PROGRAM = """
import sys
from pathlib import Path
words = sys.argv[1:]
with open("log", "a") as log:
    log.write(" ".join(words[:3]) + "\\n")
run = Path(words[words.index("--out") + 1] if "--out" in words else words[1].split("@")[0])
run.mkdir(parents=True, exist_ok=True)
(run / "lineage.json").touch()
"""


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_model(tmp_path / "hf")
    assert main(["convert", "hf", "base", "--quiet"]) == 0
    Path("solved.jsonl").write_text('{"question": "3 + 4?", "answer": "7"}\n')
    Path("picked.jsonl").write_text(
        '{"context": "3 + 4 is", "choices": [" 7", " 8"], "answer": 0}\n'
    )
    for name, text in (("sft", RECIPE), ("later", RECIPE), ("sweep", SWEEP), ("suites", SUITES)):
        Path(f"{name}.toml").write_text(text)
    program = tmp_path / "megarlx" / "__main__.py"
    program.parent.mkdir()
    program.write_text(PROGRAM)
    return tmp_path


def ran() -> list[str]:
    log = Path("log")
    log.unlink(missing_ok=True)
    config = load_config("sweep.toml", (), SweepConfig)
    launcher = ("env", f"PYTHONPATH={Path.cwd()}", sys.executable)
    own = config.model_copy(update={"launcher": launcher})
    assert SweepRunner(own, jobs_of(own), console=Console(quiet=True)).run() == 0
    return sorted(log.read_text().splitlines()) if log.exists() else []


def test_a_recipe_or_a_suite_that_was_changed_is_not_taken_for_done(base: Path) -> None:
    """Its runs had the old rate, and were reported as those of the new one."""
    sft, later = (
        "branch base@latest sft.toml",
        "branch sweep/sft-at-latest-seed-0@latest later.toml",
    )
    measured = "evaluate base@latest --config"
    assert ran() == [sft, later, measured]
    assert ran() == []
    Path("later.toml").write_text(f"# a remark\n{RECIPE}\n[logging]\nlog_every_steps = 1\n")
    assert ran() == []
    Path("later.toml").write_text(RECIPE.replace("1e-2", "1e-3"))
    assert ran() == [later]
    Path("suites.toml").write_text(SUITES.replace("samples = 2", "samples = 3"))
    assert ran() == [measured]
    Path("sft.toml").write_text(RECIPE.replace("steps = 2", "steps = 3"))
    assert ran() == [sft, later]  # what starts from it would be of the run that was
    assert ran() == []


def test_mistakes_of_recipes_and_suites_are_told_before_the_first_run(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("later.toml").write_text(RECIPE.replace("sequences_per_step", "sequences_a_step"))
    Path("suites.toml").write_text(SUITES.replace('"choice"', '"multiple_choice"'))
    assert main(["sweep", "sweep.toml"]) == 2
    said = capsys.readouterr().err
    assert "later.toml:4: training.sequences_a_step: unknown key" in said
    assert 'suites.toml:4: suites[0].kind is "multiple_choice"; expected' in said
    assert not Path("sweep").exists()


def test_recipes_whose_runs_nothing_measures_are_named(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "sweep.toml", "--list"]) == 0
    assert "what sft.toml, later.toml makes is measured by nothing" in capsys.readouterr().err
    measured = SUITES.replace("[[suites]]", "[[evaluation.suites]]")
    Path("sft.toml").write_text(f"{RECIPE}\n[evaluation]\nat_end = true\n{measured}")
    assert main(["sweep", "sweep.toml", "--list"]) == 0
    assert "measured by nothing" not in capsys.readouterr().err  # later.toml inherits them


def test_a_run_that_is_to_measure_without_suites_says_so(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("sft.toml").write_text(f"{RECIPE}\n[evaluation]\nat_end = true\n")
    assert main(["branch", "base", "sft.toml", "--out", "sft"]) == 0
    said = capsys.readouterr()
    assert "there are no suites: nothing is measured" in said.out + said.err


def test_suites_that_overlap_does_not_look_at_are_named(base: Path) -> None:
    assert not_looked_at("base", suites="suites.toml") == ["picked (choice)"]
    with pytest.raises((CheckpointError, ValueError)):
        not_looked_at("nothing", suites="suites.toml")


def stopped(tmp_path: Path, ends: str, again: int | None = None) -> tuple[float, int]:
    """A sweep that is stopped while its run is in a step; how long that took, and the run's end."""
    run = subprocess.Popen(
        [sys.executable, "-c", f"import signal, sys, time\n{ends}\nprint(1, flush=True)\n"
         "while True: time.sleep(0.1)"],
        stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert run.stdout is not None
    assert run.stdout.readline()
    config = SweepConfig(out=str(tmp_path), trunk="base")
    sweep = SweepRunner(config, [], console=Console(quiet=True))
    sweep.all = {"a": Progress(Job("a", (), None, None), "running", process=run)}
    begun, before = time.monotonic(), signal.getsignal(signal.SIGTERM)
    if again is not None:
        code = f"import os, time; time.sleep(1); os.kill({os.getpid()}, {again})"
        subprocess.Popen([sys.executable, "-c", code])
    try:
        sweep._stop_all()
    finally:
        signal.signal(signal.SIGTERM, before)
        took = time.monotonic() - begun
        code = run.wait()
    return took, code


SLOW = "signal.signal(signal.SIGTERM, lambda *_: (time.sleep({}), sys.exit(75)))"


def test_a_step_that_takes_long_is_ended_and_saved_when_a_sweep_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 30 s the run was killed, and lost what it had trained since its last checkpoint."""
    wait = subprocess.Popen.wait
    short = 0.2  # each wait with a limit is over after that

    def impatient(self: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        return wait(self, timeout if timeout is None else short)

    monkeypatch.setattr(subprocess.Popen, "wait", impatient)
    assert stopped(tmp_path, SLOW.format(1.5))[1] == 75


def test_a_second_ctrl_c_ends_the_runs_of_a_sweep_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        stopped(tmp_path, SLOW.format(60), again=signal.SIGINT)


def test_a_second_sigterm_takes_nothing_from_what_is_being_saved(tmp_path: Path) -> None:
    assert stopped(tmp_path, SLOW.format(2), again=signal.SIGTERM)[1] == 75


def test_a_reward_that_is_slow_for_its_limit_is_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "slow.py"
    path.write_text(
        "import time\ndef slow(samples):\n    time.sleep(0.6 * len(samples))\n"
        "    return [1.0] * len(samples)\n"
    )
    config = RewardConfig(
        function=f"{path}:slow", time_limit_seconds=1.0, samples_per_call=2, workers=1
    )
    pool = RewardPool(config)
    sample = Sample("3 + 4?", "7", "7", {}, "stop")
    try:
        with pytest.warns(UserWarning, match="1 of 1 calls.*time_limit_seconds = 1; .*killed"):
            assert pool.score([sample, sample]).values == [1.0, 1.0]
    finally:
        pool.close()
