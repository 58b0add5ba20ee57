"""configs/kept.toml, short: every job of one seed, and the table of what they made."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from short_runs import RL, TRUNK
from training_runs import ROOT

from megarlx.cli import main
from megarlx.config import load_config
from megarlx.config.sweep import SweepConfig
from megarlx.sweeps.plan import jobs_of

STEPS = {1250: 2, 1750: 4, 2125: 6, 2500: 8, 750: 4, 125: 2}  # of the trunk
LATE = {10: 1, 20: 1, 40: 1}
SUITES = {"math": {"questions": 4, "samples": 2}, "validation": {"questions": 4, "samples": 2}}


def short_file(folder: Path) -> Path:
    """The same arms with fewer steps: numbers are replaced where they stand alone."""
    text = (ROOT / "configs" / "kept.toml").read_text()
    text = re.sub(r"\[1755.*?\]", "[5]", text)
    text = re.sub(r"\[80, 85.*?\]", "[2, 3]", text)
    text = re.sub(r"\[600, .*?\]", "[2]", text).replace("[10, 20, 40]", "[1]")
    text = text.replace("[1e-4, 2e-4, 4e-4]", "[1e-4]")
    for before, after in STEPS.items():
        text = re.sub(rf"(?<![\d.]){before}(?![\d.])", str(after), text)
    path = folder / "kept.toml"
    path.write_text(text)
    return path


def short(folder: Path) -> SweepConfig:
    given = {"out": f"{folder}/kept", "records": f"{folder}/records"}
    overrides = [f"{key}={json.dumps(value)}" for key, value in given.items()]
    sweep = load_config(short_file(folder), [*overrides, "seeds=[7]"], SweepConfig)
    trunk = {key: json.loads(value) for key, value in TRUNK.items()}
    suites = [
        {**suite, **SUITES.get(suite["name"], {"questions": 4})}
        for suite in sweep.set["evaluation.suites"]
    ]
    for suite in suites:
        if suite["kind"] == "pass_at_k":
            suite |= {"max_new_tokens": 8, "ks": [1]}
    own = {
        **trunk,
        **sweep.set,
        "data.folder": f"{folder}/world",
        "checkpoints.save_every_steps": 2,
        "evaluation.suites": suites,
    }
    excursions = []
    for one in sweep.excursions:
        recipe = Path(one.recipes[0]).stem
        steps: dict[str, Any] = {"stages.0.steps": 2}
        if recipe == "corpus_then_rl":
            steps["stages.1.steps"] = 2
        if recipe != "sft":
            steps |= {k: json.loads(v) for k, v in RL.items() if k.startswith("rl.")}
        warm = "sft" if recipe == "sft" else "rl"
        stage = 1 if recipe == "corpus_then_rl" else 0
        steps[f"stages.{stage}.objectives.{warm}.warmup_steps"] = 1
        steps |= {"logging.validation_sequences": 4}
        if one.name in ("marked", "verified"):  # so small a model marks nothing
            steps["sft.filter"] = {"min_reward": 0.0}
        excursions.append(one.model_copy(update={"set": {**one.set, **steps}}))
    return sweep.model_copy(update={"set": own, "excursions": tuple(excursions)})


def test_every_arm_of_the_kept_study_runs_and_is_told_in_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    jobs = jobs_of(short(tmp_path))
    for job in jobs:
        assert main(list(job.arguments)) == 0, f"{job.name}: {capsys.readouterr().err}"
    made = {path.parent.name for path in (tmp_path / "kept").glob("*/lineage.json")}
    assert made == {job.out.name for job in jobs if job.out is not None}
    capsys.readouterr()
    assert main(["study", "kept", str(tmp_path / "kept")]) == 0
    said = capsys.readouterr().out
    for arm in ("vector-rl", "vector-mark-matched", "vector-random-2", "through early RL"):
        assert re.search(rf"^{arm}\s+1\s", said, re.MULTILINE), (arm, said)
    for name, parts in {"vector-permuted": "permuted:0", "vector-mark": None}.items():
        lineage = json.loads((tmp_path / "kept" / f"{name}-seed-7" / "lineage.json").read_text())
        assert lineage["sum"]["terms"][0]["change"] == parts
    partner = json.loads((tmp_path / "kept" / "partner-seed-7" / "resolved.json").read_text())
    assert (partner["training"]["seed"], partner["data"]["options"]["seed"]) == (1007, 7)
    assert (partner["training"]["steps"], partner["optimizer"]["schedule_steps"]) == (4, 8)
