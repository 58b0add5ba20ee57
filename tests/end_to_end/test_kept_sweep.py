"""The kept study, short: tuning, what it chose, the sweeps of its three worlds, their records, and
from these alone the table and the figure."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
from short_runs import RL, TRUNK
from training_runs import ROOT

from megarlx.cli import main
from megarlx.config import load_config
from megarlx.config.sweep import SweepConfig
from megarlx.sweeps.plan import Job, jobs_of
from megarlx.sweeps.records import SweepRecords

# Steps of the trunks and of pre-training behind them, by file; the short middle is 4, the end 8.
TABLES = {1250: 2, 1750: 4, 2125: 6, 2500: 8, 750: 4, 125: 2}
ARITHMETIC = {500: 2, 1000: 4, 1500: 6, 2000: 8, 250: 2}
SUITES = {"math": {"questions": 4, "samples": 2}, "validation": {"questions": 4, "samples": 2}}
SAMPLED = {"samples": 2, "max_new_tokens": 8, "ks": [1]}
WITHHELD = {
    "data.options.settings.withheld": 12,
    "data.options.settings.told_wrongly": 12,
    "data.options.settings.least_told": 0,  # so few documents tell nothing often
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With configurations of its own, so that what its tuning chooses can be put there."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "configs" / "kept_chosen.toml").unlink()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shorten(name: str, steps: dict[int, int]) -> None:
    """The same arms with fewer steps: numbers are replaced where they stand alone."""
    path = Path(f"configs/{name}.toml")
    text = path.read_text().replace('"training.seed" = 1000', '"training.seed" = 1e3')
    text = re.sub(r"\[1[70][50]5.*?\]", "[5]", text)
    text = re.sub(r"\[80, 85.*?\]", "[2, 3]", text)
    text = text.replace("[320]", "[2]").replace("[10, 20, 40]", "[1]")
    text = text.replace("[0.25, 0.5, 1.0, 1.5]", "[0.5, 1.0]")
    rates = "[1e-4, 2e-4]" if "arith" in name else "[1e-4]"  # whichever tuning left there
    text = re.sub(r'(objectives\.rl\.lr" = )\[.*?\]', rf"\g<1>{rates}", text)
    for before, after in steps.items():
        text = re.sub(rf"(?<![\d.]){before}(?![\d.])", str(after), text)
    path.write_text(text.replace("1e3", "1000"))


def short(name: str, **own: Any) -> SweepConfig:
    sweep = load_config(f"configs/{name}.toml", ["seeds=[7]"], SweepConfig)
    trunk = {key: json.loads(value) for key, value in TRUNK.items()}
    suites = [
        {**suite, **SUITES.get(suite["name"], {"questions": 4})}
        for suite in sweep.set["evaluation.suites"]
    ]
    for suite in suites:
        if suite["kind"] == "pass_at_k":
            suite |= {"max_new_tokens": 8, "ks": [1]}
    held = {
        **trunk,
        **sweep.set,
        "checkpoints.save_every_steps": 2,
        "evaluation.suites": suites,
        **own,
    }
    excursions = []
    for one in sweep.excursions:
        recipe = Path(one.recipes[0]).stem
        steps: dict[str, Any] = {"stages.0.steps": 2, "logging.validation_sequences": 4}
        if recipe.startswith(("rl", "islands")):
            steps |= {k: json.loads(v) for k, v in RL.items() if k.startswith("rl.")}
        if recipe in ("rl_early", "islands"):
            steps["stages.1.steps"] = 4 if recipe == "rl_early" else 2
        if recipe != "corpus":
            objective = "sft" if recipe == "sft" else "rl"
            steps[f"stages.0.objectives.{objective}.warmup_steps"] = 1
        if "data.sources" in one.set:  # so small a model has nothing right
            steps["data.sources"] = [
                {**source, "filter": {"min_reward": 0.0}} for source in one.set["data.sources"]
            ]
        if "evaluation.suites" in one.set:
            steps["evaluation.suites"] = [
                {**suite, "questions": 4, **(SAMPLED if suite["name"] == "math" else {})}
                for suite in one.set["evaluation.suites"]
            ]
        if one.name in ("marked", "verified"):  # so small a model marks nothing
            steps["sft.filter"] = {"min_reward": 0.0}
        excursions.append(one.model_copy(update={"set": {**one.set, **steps}}))
    return sweep.model_copy(update={"set": held, "excursions": tuple(excursions)})


def with_needs(jobs: list[Job], wanted: str) -> Iterator[Job]:
    """Those whose names match, and what they need."""
    names: set[str] = set()
    for job in reversed(jobs):
        if job.name in names or re.match(wanted, job.name):
            names |= {job.name, *job.needs}
    return (job for job in jobs if job.name in names)


def run(
    sweep: SweepConfig, capsys: pytest.CaptureFixture[str], wanted: str = ""
) -> Collection[str]:
    """As the sweep's runner does, in this process; the names of what was made."""
    jobs = list(with_needs(jobs_of(sweep), wanted))
    assert sweep.records is not None
    records = SweepRecords(Path(sweep.records), jobs, sweep.record_suites)
    for job in jobs:
        if not (job.out is not None and (job.out / "lineage.json").exists()):
            assert main(list(job.arguments)) == 0, f"{job.name}: {capsys.readouterr().err}"
        records.add(job)
    again = SweepRecords(Path(sweep.records), jobs)
    assert all(again.has(job) for job in jobs if job.arguments[0] != "train")
    made = {path.parent.name for path in Path(sweep.out).glob("*/lineage.json")}
    assert made >= {job.out.name for job in jobs if job.out is not None}
    capsys.readouterr()
    return made


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["study", *words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def of_records(capsys: pytest.CaptureFixture[str], world: str) -> str:
    """What is told without any run, which is what was told of the runs; and a figure."""
    plain = [re.sub(" +", " ", told(capsys, "kept", f"runs/{world}"))]
    shutil.rmtree("runs")
    words = ("kept", f"benchmarks/results/kept/{world}", "--figure", "kept.png")
    said = told(capsys, *words)
    assert Path("kept.png").stat().st_size > 10_000
    plain.append(re.sub(" +", " ", said))
    arms = [{line for line in text.splitlines() if re.search(r" 1 [+\d–]", line)} for text in plain]
    assert arms[0] == arms[1] != set()
    assert sum(path.stat().st_size for path in Path("benchmarks").rglob("*.json")) < 1 << 18
    return said


def test_tuning_chooses_the_rates_by_which_its_world_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tuning/kept_arithmetic_1_alpha", "tuning/kept_arithmetic_2_rates"):
        shorten(name, ARITHMETIC)
        arms = "trunk-seed-7-evaluate|vector-(rl|mark)-alpha|rl-late-(at|from-vector-rl)"
        run(short(name), capsys, arms)
    said = told(capsys, "kept-tuning", "benchmarks/results/kept_tuning")
    assert re.search(r"^vector-rl +(0\.5|1) .*chosen *$", said, re.MULTILINE), said
    assert re.search(r"^\d+ steps of pre-training cost what early RL does", said, re.MULTILINE)
    chosen = said[said.index("[kept_arithmetic.rates]") :].split("\n\n")[0]
    assert '"late-only at 1" = ' in chosen

    shorten("kept_arithmetic", ARITHMETIC)
    arms = "vector-rl-seed|rl-late-(at|from-vector-rl)|trunk-seed-7-evaluate"
    run(short("kept_arithmetic"), capsys, arms)
    assert "no [kept_arithmetic.rates]" in told(capsys, "kept", "runs/kept_arithmetic")
    Path("configs/kept_chosen.toml").write_text(chosen)
    said = of_records(capsys, "kept_arithmetic")
    for arm in ("late-only", "vector-rl"):
        assert re.search(rf"^{arm} \+ 2 +1 ", said, re.MULTILINE), said


def test_every_arm_of_the_kept_study_runs_and_is_told_in_its_table(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shorten("kept", TABLES)
    rates = (f'"{start} at {k}" = 1e-4' for start in ("late-only", "corpus") for k in (1, 2))
    Path("configs/kept_chosen.toml").write_text("\n".join(("[kept.rates]", *rates)))
    jobs = jobs_of(short("kept"))
    made = run(short("kept"), capsys)
    assert made == {job.out.name for job in jobs if job.out is not None}
    for name, change in {"vector-permuted": "permuted:0", "vector-mark": None}.items():
        lineage = json.loads(Path(f"runs/kept/{name}-seed-7/lineage.json").read_text())
        assert lineage["sum"]["terms"][0]["change"] == change
    partner = json.loads(Path("runs/kept/partner-seed-7/resolved.json").read_text())
    assert (partner["training"]["seed"], partner["data"]["options"]["seed"]) == (1007, 7)
    assert (partner["training"]["steps"], partner["optimizer"]["schedule_steps"]) == (4, 8)
    said = of_records(capsys, "kept")
    for arm in (
        *("vector-rl", "vector-mark-matched", "vector-random-2", "through early RL"),
        *("late-only + 1", "corpus + 2", "corpus of equal FLOP", "late mark-only + 1"),
    ):
        assert re.search(rf"^{re.escape(arm)} +1 ", said, re.MULTILINE), (arm, said)


def test_facts_that_text_keeps_silent_on_and_tells_wrongly_are_told_of(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shorten("kept_facts", {**TABLES, 320: 2})
    run(short("kept_facts", **WITHHELD), capsys)
    said = of_records(capsys, "kept_facts")
    for title in ("Facts that only early RL saw", "Facts that text tells wrongly"):
        section = said[said.index(title) :].split("\n\n")[0]
        for arm in ("trunk, middle", "RL in the middle", "trunk's end", "through"):
            assert re.search(rf"^{arm} +1 +\d", section, re.MULTILINE), (arm, section)


MECHANISMS = (
    *("rl-difficulty-maxrl", "rl_early-at", "corpus-at"),
    *("rl_early-distill-at-.*first-0.05", "rl_early-replay-at-.*0.02"),
    *("rl_early-replay-unverified", "rl_early-mode-at", "rl_early-mode-asked-plainly"),
    *("rl_early-protected-at-.*share-0.05", "rl_early-protected-at-random", "islands-outer"),
)


def test_what_could_carry_early_rl_runs_and_is_told_in_rows_of_its_own(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    score = "def score(samples): return [len(one.completion) for one in samples]\n"
    Path("varied.py").write_text(score)
    shorten("kept_mechanisms", {**TABLES, 80: 2, 3584000: 4 * 4 * 128, 20: 2, 50: 3})
    sweep = short("kept_mechanisms")
    for one in sweep.excursions:  # of a reward that so small a model's samples differ in
        one.set["rl.rewards"] = [{"function": "varied.py:score", "workers": 0}]
    made = run(sweep, capsys, "|".join((*MECHANISMS, ".*-evaluate")))
    for name in MECHANISMS:
        assert any(re.match(name, one) for one in made), (name, made)
    said = of_records(capsys, "kept_mechanisms")
    arms = [name for name in MECHANISMS if name not in ("rl_early-at", "corpus-at")]
    for name in (*arms, "through early RL", "RL in the middle", "corpus of equal FLOP"):
        assert re.search(rf"^{name}\S* +1 ", said, re.MULTILINE), (name, said)
