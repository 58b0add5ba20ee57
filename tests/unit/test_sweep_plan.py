"""A sweep becomes runs: which, in what order, told what."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from megarlx import processes
from megarlx.cli import main
from megarlx.config import ConfigError, load_config
from megarlx.config.sweep import SweepConfig
from megarlx.sweeps.plan import Job, jobs_of
from megarlx.sweeps.records import JobSettings
from megarlx.sweeps.run import LEFT, SweepRunner, slurm_script

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `python -m megarlx` finds what stands in the folder of the test."""
    monkeypatch.chdir(tmp_path)


def sweep(tmp_path: Path, text: str = "") -> SweepConfig:
    path = tmp_path / "sweep.toml"
    path.write_text(
        f'out = "{tmp_path}/out"\ntrunk = "{ROOT}/configs/demo_trunk.toml"\n'
        f'{text}\n[[excursions]]\nrecipes = ["recipes/rl.toml", "recipes/sft.toml"]\n'
        'checkpoints = ["1000", "tokens:3M"]\n'
    )
    return load_config(path, (), SweepConfig)


def test_runs_are_trunks_times_checkpoints_times_recipes_times_seeds(tmp_path: Path) -> None:
    text = 'seeds = [3, 5]\nevaluate = ["1000"]\n[axes]\n"model.hidden_size" = [64, 96]'
    jobs = jobs_of(sweep(tmp_path, text))
    kinds = [job.arguments[0] for job in jobs]
    assert (kinds.count("train"), kinds.count("evaluate"), kinds.count("branch")) == (4, 4, 16)
    assert len({job.name for job in jobs}) == len(jobs)
    assert len({job.out for job in jobs if job.out is not None}) == 20
    seen: set[str] = set()
    for job in jobs:
        assert seen.issuperset(job.needs)
        seen.add(job.name)
    wide = next(job for job in jobs if job.name == "trunk-hidden_size-96-seed-5")
    assert "model.hidden_size=96" in wide.arguments
    assert "training.seed=5" in wide.arguments


def test_code_of_the_users_own_trunk_is_trusted_and_a_strangers_as_the_sweep_says(
    tmp_path: Path,
) -> None:
    (tmp_path / "trunk.toml").write_text(
        (ROOT / "configs" / "demo_trunk.toml").read_text()
        + '[objectives.mine.rl]\nprompts = "p"\nrewards = [{ function = "mine:reward" }]\n'
    )
    text = 'evaluate = ["1000"]\n'
    own = sweep(tmp_path, text).model_copy(update={"trunk": str(tmp_path / "trunk.toml")})
    (tmp_path / "run").mkdir()
    there = sweep(tmp_path, text + 'trust = ["theirs:reward"]\n')
    there = there.model_copy(update={"trunk": str(tmp_path / "run")})
    for config, name in ((own, "mine:reward"), (there, "theirs:reward")):
        words = [job.arguments for job in jobs_of(config) if job.arguments[0] != "train"]
        assert words
        assert all(word[-2:] == ("--trust", name) for word in words)


def test_a_run_that_is_there_is_measured_once_and_branched_with_every_seed(tmp_path: Path) -> None:
    run = tmp_path / "public"
    run.mkdir()
    path = tmp_path / "sweep.toml"
    path.write_text(
        f'out = "{tmp_path}/out"\ntrunk = "{run}"\nseeds = [3, 5]\nevaluate = ["1000"]\n'
        'suites = "suites.toml"\n[[excursions]]\nrecipes = ["rl.toml"]\nset = {"rl.slots" = 8}\n'
    )
    measured, *branches = jobs_of(load_config(path, (), SweepConfig))
    assert measured.arguments == ("evaluate", f"{run}@1000", "--config", "suites.toml")
    assert [job.needs for job in (measured, *branches)] == [()] * 3
    for job, seed in zip(branches, (3, 5), strict=True):
        out = tmp_path / "out" / f"rl-at-latest-seed-{seed}"
        assert job.arguments[:5] == ("branch", f"{run}@latest", "rl.toml", "--out", str(out))
        assert {f"training.seed={seed}", "rl.slots=8"} <= set(job.arguments)


def test_trunks_can_be_those_of_another_sweep(tmp_path: Path) -> None:
    own = jobs_of(sweep(tmp_path))
    theirs = jobs_of(sweep(tmp_path, 'trunks = "elsewhere"'))
    assert [job.name for job in own] == [job.name for job in theirs]
    for job in theirs:
        assert job.out is not None
        if job.arguments[0] == "train":
            assert job.out == Path("elsewhere") / job.name
        else:
            assert job.arguments[1].startswith(f"elsewhere/{job.needs[0]}@")
            assert job.out == tmp_path / "out" / job.name


# Whose trunk is trained; one of converted revisions has a test of its own.
SWEEPS = [
    path
    for path in ROOT.glob("configs/**/*.toml")
    if re.search(r'^trunk = ".*\.toml"', path.read_text(), re.MULTILINE)
]


def test_every_sweep_that_comes_with_megarlx_can_be_planned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    assert SWEEPS
    for path in SWEEPS:
        for job in jobs_of(load_config(path, (), SweepConfig)):
            recipe = job.arguments[2] if job.arguments[0] == "branch" else "README.md"
            assert (ROOT / recipe).exists(), (path, recipe)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_the_trunk_of_a_sweep_saves_the_checkpoints_that_the_sweep_names(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    sweep = load_config(path, (), SweepConfig)
    job = next(job for job in jobs_of(sweep) if job.arguments[0] == "train")
    words = job.arguments
    trunk = load_config(words[1], [value for key, value in pairwise(words) if key == "--set"])
    named = {*sweep.evaluate, *(one.onto for one in sweep.transplants)}
    named |= {at for one in sweep.excursions if not one.runs for at in one.checkpoints}
    assert named
    for at in named - {"latest"}:
        if at.startswith("tokens:"):
            tokens = float(at.removeprefix("tokens:").replace("B", "e9").replace("M", "e6"))
            a_step = trunk.training.sequences_per_step * trunk.training.sequence_length
            assert tokens <= trunk.steps * a_step
        else:
            assert 0 < int(at) <= trunk.steps
            assert int(at) % trunk.checkpoints.save_every_steps == 0 or int(at) == trunk.steps


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_every_run_of_a_sweep_has_settings_that_hold(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    sweep = load_config(path, (), SweepConfig)
    settings = JobSettings(jobs_of(sweep.model_copy(update={"seeds": sweep.seeds[:1]})))
    hashes = [settings(job) for job in settings.jobs.values()]
    assert len(set(hashes)) == len(hashes)


def runner(tmp_path: Path, todo: list[Job], **settings: object) -> SweepRunner:
    """Jobs are programs of this test in place of megarlx."""
    program = tmp_path / "megarlx" / "__main__.py"
    program.parent.mkdir(exist_ok=True)
    program.write_text(
        "import sys\nfrom pathlib import Path\nlog = Path(sys.argv[1])\n"
        "log.open('a').write(sys.argv[2] + '\\n')\nsys.exit(int(sys.argv[3]))\n"
    )
    config = sweep(tmp_path).model_copy(
        update={"launcher": ("env", f"PYTHONPATH={tmp_path}", sys.executable), **settings}
    )
    made = SweepRunner(config, todo, console=Console(quiet=True))
    made.settings = lambda job: ""  # these commands name no configurations
    return made


def job(tmp_path: Path, name: str, code: int = 0, *needs: str) -> Job:
    return Job(name, (str(tmp_path / "log"), name, str(code)), None, None, needs)


def ran(tmp_path: Path) -> list[str]:
    path = tmp_path / "log"
    return sorted(path.read_text().split()) if path.exists() else []


def test_a_job_that_fails_stops_only_what_needs_it_and_is_run_again(tmp_path: Path) -> None:
    first = [job(tmp_path, "a", 3), job(tmp_path, "b", 0, "a"), job(tmp_path, "c")]
    assert runner(tmp_path, first).run() == 1
    assert ran(tmp_path) == ["a", "c"]
    mended = [job(tmp_path, "a"), job(tmp_path, "b", 0, "a"), job(tmp_path, "c")]
    assert runner(tmp_path, mended).run() == 0
    assert ran(tmp_path) == ["a", "a", "b", "c"]
    assert runner(tmp_path, mended).run() == 0
    assert ran(tmp_path) == ["a", "a", "b", "c"]


def test_a_job_told_something_else_is_not_taken_for_done(tmp_path: Path) -> None:
    assert runner(tmp_path, [job(tmp_path, "a")]).run() == 0
    other = Job("a", (str(tmp_path / "log"), "other", "0"), None, None)
    assert runner(tmp_path, [other]).run() == 0
    assert ran(tmp_path) == ["a", "other"]


def test_a_budget_leaves_the_rest_for_later(tmp_path: Path) -> None:
    jobs = [job(tmp_path, "a"), job(tmp_path, "b")]
    assert runner(tmp_path, jobs, jobs=1, budget_minutes=1e-9).run() == LEFT
    assert ran(tmp_path) == []
    assert runner(tmp_path, jobs).run() == 0


def test_sigterm_ends_the_runs_and_they_are_not_taken_for_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [job(tmp_path, "a")]
    one = runner(tmp_path, jobs)
    one.console = Console()
    program = tmp_path / "megarlx" / "__main__.py"
    said = tmp_path / "told"
    program.write_text(
        "import signal, sys, time\nfrom pathlib import Path\n"
        f"def end(*_):\n    Path({str(said)!r}).write_text('to end')\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "import os\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(30)\n"
    )
    with pytest.raises(KeyboardInterrupt):
        one.run()
    assert said.read_text() == "to end"
    assert "stopping a: each is saved first" in capsys.readouterr().out
    runner(tmp_path, jobs)  # writes the program that ends well
    assert runner(tmp_path, jobs).run() == 0
    assert ran(tmp_path) == ["a"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_just_starting_is_told_to_end_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    made = runner(tmp_path, [job(tmp_path, "a")])
    (tmp_path / "megarlx" / "__main__.py").write_text("import time\ntime.sleep(60)\n")
    started: list[subprocess.Popen[bytes]] = []

    def start(*args: Any, **settings: Any) -> subprocess.Popen[bytes]:
        started.append(processes.start(*args, **settings))
        signal.raise_signal(number)  # before the sweep holds what it started
        return started[0]

    own = SimpleNamespace(start=start, signal_group=processes.signal_group)
    monkeypatch.setattr("megarlx.sweeps.run.processes", own)
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(KeyboardInterrupt):
        made.run()
    assert started[0].returncode == -signal.SIGTERM
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_the_slurm_script_is_valid_and_holds_every_command(tmp_path: Path) -> None:
    config = sweep(tmp_path, "seeds = [0, 1]")
    jobs = jobs_of(config)
    path = tmp_path / "submit.sh"
    path.write_text(slurm_script(config, jobs))
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    text = path.read_text()
    assert all(" ".join(one.arguments[:2]) in text for one in jobs)
    assert '--dependency="afterok:$level0"' in text
    assert "--array=0-1%" in text


def test_list_prints_the_commands_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a recipe is missing that is said, before a trunk is trained for it."""
    sweep(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    recipes = {name: ROOT / "configs" / "recipes" / name for name in ("rl.toml", "sft.toml")}
    (tmp_path / "recipes" / "rl.toml").write_text(recipes["rl.toml"].read_text())
    assert main(["sweep", str(tmp_path / "sweep.toml")]) == 2
    missing = "excursions[0].recipes: there is no file 'recipes/sft.toml'\n"
    assert capsys.readouterr().err == missing
    (tmp_path / "recipes" / "sft.toml").write_text(recipes["sft.toml"].read_text())
    assert main(["sweep", str(tmp_path / "sweep.toml"), "--list"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 5
    assert said[0].startswith("megarlx train ")
    assert not (tmp_path / "out").exists()


def test_a_sweep_without_values_on_an_axis_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lr has no values"):
        sweep(tmp_path, '[axes]\n"optimizer.lr" = []')
    with pytest.raises(ConfigError, match=r"axes\.optimizer\.lr is 0.001; expected a list"):
        sweep(tmp_path, '[axes]\n"optimizer.lr" = 1e-3')


KEPT = """
[[partners]]
name = "partner"
add = { "training.seed" = 1000 }
set = { "training.steps" = 1000 }
[[excursions]]
recipes = ["late.toml"]
runs = ["added", "partner"]
axes = { "stages.0.objectives.rl.lr" = [1e-4] }
[[transplants]]
name = "added"
excursions = ["rl-at-1000", "sft-at-1000"]
onto = "2000"
alpha = [1.0, 0.5]
[[transplants]]
name = "alike"
excursions = ["rl-at-1000"]
starts = ["partner@1000"]
onto = "2000"
match = "added"
[[transplants]]
name = "grid"
excursions = ["rl-at-1000"]
each_alpha = [0.5, 1.0]
change = "random:3"
"""


def test_runs_start_from_runs_and_sums_are_made_of_runs(tmp_path: Path) -> None:
    config = load_config(kept(tmp_path), (), SweepConfig)
    jobs = {job.name: job for job in jobs_of(config)}
    seen: set[str] = set()
    for one in jobs.values():
        assert seen.issuperset(one.needs)
        seen.add(one.name)
    out = tmp_path / "out"
    late = jobs["late-from-added-lr-0.0001-seed-3"]
    assert (late.arguments[1], late.needs) == (f"{out}/added-seed-3@latest", ("added-seed-3",))
    assert "training.seed=1003" in jobs["partner-seed-3"].arguments
    added = jobs["added-seed-3"]
    words = ["transplant", f"{out}/rl-at-1000-seed-3", f"{out}/sft-at-1000-seed-3"]
    words += ["--onto", f"{out}/trunk-seed-3@2000", "--out", f"{out}/added-seed-3"]
    assert list(added.arguments) == [*words, "--alpha", "1,0.5"]
    assert set(added.needs) == {"trunk-seed-3", "rl-at-1000-seed-3", "sft-at-1000-seed-3"}
    alike = jobs["alike-seed-3"]
    assert alike.arguments[-4:] == (
        *("--from", f"{out}/partner-seed-3@1000"),
        *("--match", f"{out}/added-seed-3"),
    )
    assert {"partner-seed-3", "added-seed-3"} <= set(alike.needs)
    assert jobs["alike-seed-3-evaluate"].needs == ("alike-seed-3",)
    for alpha in ("0.5", "1"):
        words = jobs[f"grid-alpha-{alpha}-seed-3"].arguments
        assert words[-4:] == ("--alpha", alpha, "--change", "random:3")
    script = slurm_script(config, [*jobs.values()])
    assert '--dependency="afterok:$level2"' in script


def test_a_run_that_reads_what_another_has_kept_waits_for_it(tmp_path: Path) -> None:
    text = """
[[excursions]]
recipes = ["sft.toml"]
name = "own"
checkpoints = ["1000"]
set = { "sft.conversations" = "rollouts:{run rl-at-1000}@40" }
"""
    jobs = {job.name: job for job in jobs_of(load_config(kept(tmp_path, text), (), SweepConfig))}
    own = jobs["sft-own-at-1000-seed-3"]
    assert own.needs == ("trunk-seed-3", "rl-at-1000-seed-3")
    out = tmp_path / "out" / "rl-at-1000-seed-3"
    assert f'sft.conversations="rollouts:{out}@40"' in own.arguments


def kept(tmp_path: Path, text: str = KEPT) -> Path:
    path = tmp_path / "kept.toml"
    path.write_text(
        f'out = "{tmp_path}/out"\ntrunk = "{ROOT}/configs/demo_trunk.toml"\nseeds = [3]\n'
        '[[excursions]]\nrecipes = ["rl.toml", "sft.toml"]\ncheckpoints = ["1000"]\n' + text
    )
    return path


REFUSED = {
    "needs none-seed-3, which is no run of the sweep: trunk-seed-3": (
        '[[transplants]]\nname = "x"\nexcursions = ["none"]\n'
    ),
    "runs of the sweep need each other": (
        '[[transplants]]\nname = "x"\nexcursions = ["rl-from-x"]\n'
        '[[excursions]]\nrecipes = ["rl.toml"]\nruns = ["x"]\n'
    ),
    "match and each_alpha cannot be given together": (
        '[[transplants]]\nname = "x"\nexcursions = ["rl-at-1000"]\nmatch = "y"\n'
        "each_alpha = [1.0]\n"
    ),
    "partners add 1 to data.folder": '[[partners]]\nname = "p"\nadd = { "data.folder" = 1 }\n',
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_sum_that_cannot_be_made_is_refused(tmp_path: Path, why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)):
        jobs_of(load_config(kept(tmp_path, REFUSED[why]), (), SweepConfig))


def test_a_match_that_is_not_reached_is_no_failure_and_stops_what_needs_it(tmp_path: Path) -> None:
    """It is a finding; the study counts it."""
    made = [
        Job("a", (str(tmp_path / "log"), "a", "0"), None, None),
        Job("none", ("transplant", "x", "3"), None, None, ("a",)),
        Job("below", (str(tmp_path / "log"), "below", "0"), None, None, ("none",)),
        Job("beside", (str(tmp_path / "log"), "beside", "0"), None, None, ("a",)),
    ]
    assert runner(tmp_path, made).run() == 0
    assert ran(tmp_path) == ["a", "beside"]
    assert (tmp_path / "megarlx").exists()


def test_both_worlds_are_asked_the_same_question_of_placement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many steps before the trunk's end, with the same recipes."""
    monkeypatch.chdir(ROOT)
    asked = []
    for name in ("placement", "placement_agreeing"):
        sweep = load_config(ROOT / "configs" / f"{name}.toml", (), SweepConfig)
        end = load_config(sweep.trunk).steps
        left = [end - int(at) for at in sweep.evaluate]
        excursions = [
            {**one.model_dump(), "checkpoints": [end - int(at) for at in one.checkpoints]}
            for one in sweep.excursions
        ]
        asked.append((left, excursions, sweep.seed_keys))
    assert asked[0] == asked[1]
    assert {key.split(".")[0] for key in sweep.set} == {"data"}


def test_checkpoints_that_a_trunk_does_not_hold_are_said_before_anything_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "recipe.toml").write_text("")
    path = tmp_path / "sweep.toml"
    path.write_text(f"""
out = "{tmp_path}/out"
trunk = "{tmp_path}/run"
evaluate = ["1000"]
[[excursions]]
recipes = ["{tmp_path}/recipe.toml"]
checkpoints = ["1000", "2000"]
""")
    assert main(["sweep", str(path), "--list"]) == 2
    shown = capsys.readouterr()
    assert "megarlx branch" not in shown.out
    for iteration in ("1000", "2000"):
        assert f"run@{iteration}: the run {tmp_path}/run holds no checkpoints" in shown.err


def test_where_no_table_can_be_shown_a_line_now_and_then_says_what_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megarlx.sweeps.run.TELL_SECONDS", 0.0)
    one = runner(tmp_path, [job(tmp_path, "a")])
    one.console = Console(force_terminal=False)
    assert one.run() == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "a: at work, 0 s"
    assert said[-1].startswith("a: done in ")


def test_a_sweep_of_which_all_is_done_says_so_and_what_is_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [job(tmp_path, "a"), job(tmp_path, "b")]
    assert runner(tmp_path, jobs).run() == 0
    again = runner(tmp_path, jobs)
    again.console = Console(force_terminal=False)
    assert again.run() == 0
    said = capsys.readouterr().out
    assert said == f"all 2 are done already; next: megarlx report {again.config.out}\n"
