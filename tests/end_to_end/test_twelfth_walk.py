"""The walk done a twelfth time: finished runs, damaged ones, and files that hold nothing."""

from __future__ import annotations

import subprocess
import sys
import warnings
from io import StringIO
from pathlib import Path

import pytest
from public_models import tiny_model
from rich.console import Console
from training_runs import environment, train, write_config

from megarlx.cli import main
from megarlx.config.reward import RewardConfig
from megarlx.config.sweep import SweepConfig
from megarlx.planning.report import _gb, _seconds
from megarlx.report.style import look_of
from megarlx.rollouts.rewards.process import RewardError, RewardPool
from megarlx.rollouts.rewards.sample import Sample
from megarlx.sweeps.plan import Job
from megarlx.sweeps.run import Progress, SweepRunner
from megarlx.training.metrics import read_metrics

RECIPE = """
[training]
sequence_length = 64
sequences_per_step = 1
sequences_per_microbatch = 1
[template]
user = "Q: {content} A:"
assistant = " {content}"
[sft]
conversations = "solved.jsonl"
[rl]
prompts = "asked.jsonl"
prompts_per_step = 1
samples_per_prompt = 2
max_completion_tokens = 4
[[rl.rewards]]
function = "final_number"
[[stages]]
steps = 1
objectives = { OBJECTIVE = { lr = 1e-3 } }
"""
SUITE = """
[[evaluation.suites]]
name = "asked"
kind = "pass_at_k"
path = "asked.jsonl"
samples = 2
ks = [1]
max_new_tokens = 4
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of Hugging Face, with questions and answers beside it."""
    monkeypatch.chdir(tmp_path)
    tiny_model(tmp_path / "hf")
    Path("solved.jsonl").write_text('{"question": "3 + 4?", "answer": "7"}\n')
    Path("asked.jsonl").write_text('{"question": "3 + 4?", "answer": "7"}\n')
    for objective in ("sft", "rl"):
        text = RECIPE.replace("OBJECTIVE", objective)
        Path(f"{objective}.toml").write_text(text + SUITE)
    return Path("hf")


def branch(recipe: str, out: str, *overrides: str) -> int:
    words = [word for override in overrides for word in ("--set", override)]
    return main(["branch", "hf", recipe, "--out", out, *words])


def test_a_finished_run_that_is_given_again_tells_its_results_once(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told() -> list[tuple[int, str]]:
        lines = read_metrics(Path("sft/metrics.jsonl"))
        return [(line["step"], key) for line in lines for key in line if key.startswith("eval/")]

    at_end = "evaluation.at_end=true"
    assert branch("sft.toml", "sft", at_end) == 0
    before = told()
    assert (1, "eval/asked/pass_at_1") in before
    capsys.readouterr()
    assert branch("sft.toml", "sft", at_end) == 0
    assert told() == before
    assert "step 1/1: eval/asked/pass_at_1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recipe", "file", "key"),
    [("sft.toml", "solved.jsonl", "sft.conversations"), ("rl.toml", "asked.jsonl", "rl.prompts")],
)
def test_a_file_of_nothing_is_named(
    model: Path, capsys: pytest.CaptureFixture[str], recipe: str, file: str, key: str
) -> None:
    Path(file).write_text("")
    assert branch(recipe, "out") != 0
    assert f"{key} is '{file}': the file holds none" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_run_lies_neither_in_a_file_nor_around_others(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert branch("sft.toml", "asked.jsonl") == 1
    assert "asked.jsonl is a file; a run is a folder" in capsys.readouterr().err
    assert branch("sft.toml", "mine/sft") == 0
    assert branch("sft.toml", "mine") == 1
    said = capsys.readouterr().err
    assert "mine is a folder of runs, sft among them; a run has one of its own: --out" in said
    assert sorted(path.name for path in Path("mine").glob("*") if path.is_dir())[-1] == "sft"
    assert not (Path("mine") / "lineage.json").exists()


def test_suites_that_cannot_be_asked_are_refused_before_any_is(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert branch("sft.toml", "sft", "evaluation.at_end=true") == 0
    suites = SUITE.replace("evaluation.", "")
    longer = suites.replace('"asked"', '"longer"').replace(
        "max_new_tokens = 4", "max_new_tokens = 4000"
    )
    Path("suites.toml").write_text(suites.replace("samples = 2", "samples = 4") + longer)
    capsys.readouterr()
    assert main(["evaluate", "sft", "--config", "suites.toml"]) == 1
    said = capsys.readouterr()
    assert "max_new_tokens is 4000" in said.err
    assert "replaces the result" not in said.out
    Path("suites.toml").write_text("")
    assert main(["evaluate", "sft", "--config", "suites.toml"]) == 2
    assert "no suites: suites.toml has none; each is a [[suites]]" in capsys.readouterr().err


def test_verify_does_not_pass_over_the_newest_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = write_config(tmp_path, tmp_path / "world"), tmp_path / "run"
    assert train(config, out, "training.steps=4", "checkpoints.save_every_steps=2") == 0
    assert main(["inspect", str(out), "--verify"]) == 0
    newest = out / "checkpoints" / "iter_00000004" / "model-00000.safetensors"
    newest.write_bytes(newest.read_bytes()[:-8])
    capsys.readouterr()
    assert main(["inspect", str(out), "--verify"]) == 1
    assert "iter_00000004" in capsys.readouterr().err
    assert main(["inspect", f"{out}@2", "--verify"]) == 0
    assert "verified" in capsys.readouterr().out
    # A warning of ours is a line, without a place in the code.
    words = [sys.executable, "-m", "megarlx", "inspect", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), check=True)
    (line,) = [line for line in done.stderr.splitlines() if "Going on from" in line]
    assert line.startswith("warning: ")
    assert "warnings.warn" not in done.stderr


def test_warnings_of_others_keep_their_place_in_the_code() -> None:
    with pytest.raises(SystemExit):
        main(["inspect", "--help"])
    said = warnings.formatwarning(UserWarning("odd"), UserWarning, __file__, 7, "x = 1")
    assert f"{__file__}:7: UserWarning: odd" in said


@pytest.mark.parametrize("of_a_class", [False, True])
def test_an_asynchronous_reward_is_refused_with_what_to_do(
    tmp_path: Path, of_a_class: bool
) -> None:
    path = tmp_path / "later.py"
    body = "async def later(samples):\n    return [1.0] * len(samples)\n"
    if of_a_class:
        body = (
            "class later:\n    async def __call__(self, samples):\n"
            "        return [1.0] * len(samples)\n"
        )
    path.write_text(body)
    pool = RewardPool(RewardConfig(function=f"{path}:later", workers=1))
    try:
        with pytest.raises(RewardError, match="is `async def`; a reward is a plain function"):
            pool.score([Sample("3 + 4?", "7", "7", {}, "stop")])
    finally:
        pool.close()


@pytest.mark.parametrize(("settings", "threads"), [({}, "3"), ({"threads_per_job": 2}, "2")])
def test_a_sweeps_runs_have_the_threads_that_the_user_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, int], threads: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    told = tmp_path / "told"
    launcher = ("sh", "-c", f"echo $OMP_NUM_THREADS > {told}")
    config = SweepConfig(out=str(tmp_path), trunk="base", launcher=launcher, **settings)
    runner = SweepRunner(config, [], console=Console(file=StringIO()))
    runner.logs.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(runner, "settings", lambda job: "")
    progress = Progress(Job("one", ("branch",), tmp_path, None), "waiting")
    runner.all = {"one": progress}
    runner._start(progress)
    assert progress.process is not None
    progress.process.wait()
    assert told.read_text().strip() == threads


def test_a_trunk_with_a_setting_takes_no_recipes_colour() -> None:
    labels = ["base", "mine"]
    after = look_of("mine", labels)
    assert look_of("mine", [*labels, "base (after cpt)"]) == after
    assert look_of("base (after cpt)", labels).color == look_of("base", labels).color


def test_a_plan_of_a_small_model_shows_what_it_holds() -> None:
    assert [_gb(n) for n in (1_830_000, 99_999_999, 10**8, 25 * 10**8)] == [
        *("0.001830", "0.100000", "0.10", "2.50")
    ]
    assert (_gb(1_830_000, of=10**9), _gb(0, of=10**6)) == ("0.00", "0.000000")
    assert [_seconds(n) for n in (0.00042, 0.1, 12.5)] == ["0.000420", "0.100", "12.500"]
    assert _seconds(0.00042, of=1.0) == "0.000"
