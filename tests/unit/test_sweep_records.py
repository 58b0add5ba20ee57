"""A sweep goes on from its records alone; a trunk that is gone is trained again when needed."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megarlx.config import load_config
from megarlx.config.sweep import SweepConfig
from megarlx.sweeps.plan import jobs_of
from megarlx.sweeps.records import JobSettings
from megarlx.sweeps.run import SweepRunner

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, sys
from pathlib import Path
words = sys.argv[1:]
with open("log", "a") as log:
    log.write(" ".join(words[:2]).replace(str(Path.cwd()), "") + "\\n")
trunk = Path(words[1].partition("@")[0])
run = Path(words[words.index("--out") + 1]) if "--out" in words else trunk
(run / "evaluations").mkdir(parents=True, exist_ok=True)
parent = {"run": str(trunk), "iteration": 1000, "trunk_tokens": 5, "tokens": {}}
kept = {"recipe": None, "seed": 3, "trunk_tokens": 0, "composition": {}}
lineage = kept | {"parent": parent if words[0] == "branch" else None}
(run / "lineage.json").write_text(json.dumps(lineage))
(run / "resolved.json").write_text(json.dumps({"training": {"steps": 1000}}))
(run / "metrics.jsonl").write_text('{"step": 1000, "cost/seconds": 2.0}\\n')
if words[0] != "train":
    made = {"format": 1, "suite": "math", "kind": "pass_at_k", "iteration": 1000}
    made |= {"trunk_tokens": 5, "metrics": {"pass_at_1": 0.5}, "guessing": {}}
    made["items"] = [{"id": "test/0", "samples": 4, "correct": 2}]
    (run / "evaluations" / "iter_00001000.math.json").write_text(json.dumps(made))
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "megarlx" / "__main__.py"
    program.parent.mkdir()
    program.write_text(PROGRAM)
    text = (ROOT / "configs" / "recipes" / "rl.toml").read_text()
    (tmp_path / "rl.toml").write_text(text)
    (tmp_path / "sft.toml").write_text((ROOT / "configs" / "recipes" / "sft.toml").read_text())


def sweep(*overrides: str, recipes: str = '"rl.toml"') -> SweepConfig:
    Path("sweep.toml").write_text(
        f'out = "runs"\nrecords = "records"\ntrunk = "{ROOT}/configs/demo_trunk.toml"\n'
        'seeds = [3]\nevaluate = ["1000"]\n'
        f'[[excursions]]\nrecipes = [{recipes}]\ncheckpoints = ["1000"]\n'
    )
    return load_config("sweep.toml", overrides, SweepConfig)


def run(config: SweepConfig) -> list[str]:
    """The commands that were run."""
    log = Path("log")
    log.unlink(missing_ok=True)
    launcher = ("env", f"PYTHONPATH={Path.cwd()}", sys.executable)
    own = config.model_copy(update={"launcher": launcher})
    assert SweepRunner(own, jobs_of(own), console=Console(quiet=True)).run() == 0
    return sorted(log.read_text().splitlines()) if log.exists() else []


TRAIN = f"train {ROOT}/configs/demo_trunk.toml"
EVALUATE, BRANCH = "evaluate runs/trunk-seed-3@1000", "branch runs/trunk-seed-3@1000"


def test_what_stands_in_the_records_is_not_run_again_without_any_folder() -> None:
    assert run(sweep()) == [BRANCH, EVALUATE, TRAIN]
    held = json.loads(Path("records/seed-3.json").read_text())
    assert set(held["done"]) == {"trunk-seed-3-evaluate-1000", "rl-at-1000-seed-3"}
    shutil.rmtree("runs")
    assert run(sweep()) == []


def test_what_is_next_is_a_report_of_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    own = sweep()
    run(own)

    def told() -> str:
        capsys.readouterr()
        assert SweepRunner(own, jobs_of(own), console=Console(width=200)).run() == 0
        return capsys.readouterr().out

    every = "all 3 are done already; next: megarlx report"
    assert told() == f"{every} runs\n"
    shutil.rmtree("runs/rl-at-1000-seed-3")
    assert told() == f"{every} runs --records records\n"
    shutil.rmtree("runs")
    assert told() == f"{every} records\n"


def test_a_trunk_that_is_gone_is_trained_again_where_something_needs_it() -> None:
    run(sweep())
    shutil.rmtree("runs/trunk-seed-3")  # what the sweep has noted of it stays
    assert run(sweep()) == []
    assert run(sweep(recipes='"rl.toml", "sft.toml"')) == [BRANCH, TRAIN]


def test_a_run_whose_folder_is_gone_without_a_record_is_run_again() -> None:
    run(sweep())
    shutil.rmtree("records")
    shutil.rmtree("runs/rl-at-1000-seed-3")
    assert run(sweep()) == [BRANCH]


@pytest.mark.parametrize("where", ["recipe", "trunk", "excursion"])
def test_other_settings_are_not_taken_for_done(where: str) -> None:
    run(sweep())
    shutil.rmtree("runs")
    changes = ()
    if where == "recipe":
        text = Path("rl.toml").read_text()
        Path("rl.toml").write_text(text.replace("steps = 80", "steps = 81"))
        expected = [BRANCH, TRAIN]
    elif where == "trunk":
        changes = ('set={"optimizer.lr"=4e-3}',)
        expected = [BRANCH, EVALUATE, TRAIN]
    else:
        changes = ('excursions.0.set={"rl.samples_per_prompt"=8}',)
        expected = [BRANCH, TRAIN]
    assert run(sweep(*changes)) == expected


def test_a_hash_knows_no_seed_no_path_and_no_default() -> None:
    def hashed(*overrides: str) -> str:
        return JobSettings(jobs_of(sweep(*overrides))).all()

    one = hashed()
    assert hashed("seeds=[3,4,5]", 'out="elsewhere"') == one
    assert hashed('set={"training.z_loss"=0.0,"checkpoints.save_every_steps"=500}') == one
    for key in ('held_out_documents"=500', 'settings.foreign_share"=0.0', 'settings.slots"=4'):
        assert hashed(f'set={{"data.options.{key}}}') == one
    assert hashed('set={"data.options.settings.foreign_share"=0.05}') != one
    text = Path("rl.toml").read_text()
    Path("rl.toml").write_text("# another word\n" + text)
    assert hashed() == one
    Path("rl.toml").write_text(text.replace("lr = 2e-4", "lr = 3e-4"))
    assert hashed() != one
    Path("rl.toml").write_text(text)
    assert hashed('evaluate=["2000"]') != one
