"""What is measured before RL begins: once, at its first step, with RL's own prompts and rewards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_branch_command import TRUNK, branch
from training_runs import train

from megarlx.training.metrics import read_metrics

RL = """
[rl]
prompts_per_step = 2
samples_per_prompt = 4
max_completion_tokens = 8
temperature = 0.9

[[rl.rewards]]
function = "marked_answer"
weight = 3.0
workers = 0
"""
SFT_STAGE = "[sft]\n[[stages]]\nsteps = 2\n[stages.objectives.sft]\nlr = 4e-4\n"
RL_STAGE = "[[stages]]\nsteps = 2\n[stages.objectives.rl]\nlr = 4e-4\n"
FIVE = "evaluation.readiness_prompts=5"


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probed")
    config = folder / "trunk.toml"
    config.write_text(TRUNK.format(world=folder / "world"))
    assert train(config, folder / "run", "training.steps=4") == 0
    return folder / "run"


def recipe(folder: Path, *parts: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text("[logging]\nlog_every_steps = 1\n" + "".join(parts))
    return path


def probes(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("evaluations/*readiness*.json"))


def probed(out: Path) -> list[int]:
    """The steps at which metrics have it."""
    key = "eval/rl-readiness/informative_groups"
    return [int(line["step"]) for line in read_metrics(out / "metrics.jsonl") if key in line]


def test_a_probe_before_the_first_step_of_rl_is_written_and_logged(
    trunk: Path, tmp_path: Path
) -> None:
    out = tmp_path / "rl"
    assert branch(f"{trunk}@4", recipe(tmp_path, RL, RL_STAGE), out, FIVE) == 0
    assert probes(out) == ["iter_00000000.rl-readiness.json"]
    assert probed(out) == [0]
    found = json.loads((out / "evaluations" / probes(out)[0]).read_text())
    suite = found["settings"]["suite"]
    assert (suite["temperature"], suite["samples"], suite["group_size"]) == (0.9, 4, 4)
    assert suite["max_new_tokens"] == 8
    assert len(found["items"]) == 5
    counts = [item["correct"] for item in found["items"]]
    share = sum(0 < c < 4 for c in counts) / 5
    assert found["metrics"]["informative_groups"] == pytest.approx(share)
    assert set(found["metrics"]) == {"pass_at_1", "pass_at_4", "informative_groups", "truncated"}
    assert found["trunk_tokens"] == 4 * 4 * 128


def test_rl_after_sft_is_probed_where_it_begins_and_not_again_on_resume(
    trunk: Path, tmp_path: Path
) -> None:
    out, both = tmp_path / "both", recipe(tmp_path, RL, SFT_STAGE, RL_STAGE)
    stopping = (FIVE, "checkpoints.save_every_steps=1", "logging.stop_after_minutes=1e-9")
    codes = [branch(f"{trunk}@4", both, out, *stopping) for _ in range(3)]
    assert codes == [75, 75, 75]
    assert probes(out) == ["iter_00000002.rl-readiness.json"]
    path = out / "evaluations" / probes(out)[0]
    written = path.stat().st_mtime_ns
    shutil.rmtree(out / "checkpoints" / "iter_00000003")  # it goes on where RL begins
    with pytest.warns(UserWarning, match="iter_00000002"):
        assert branch(f"{trunk}@4", both, out, FIVE) == 0
    assert path.stat().st_mtime_ns == written
    assert set(probed(out)) == {2}


def test_no_probe_where_nothing_is_asked_or_nothing_begins(trunk: Path, tmp_path: Path) -> None:
    none = "evaluation.readiness_prompts=0"
    assert branch(f"{trunk}@4", recipe(tmp_path, RL, RL_STAGE), tmp_path / "none", none) == 0
    assert probes(tmp_path / "none") == []
    assert branch(f"{trunk}@4", recipe(tmp_path, SFT_STAGE), tmp_path / "sft") == 0
    assert probes(tmp_path / "sft") == []
