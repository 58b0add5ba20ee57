"""`megarlx train` of an agent: tasks written, a cold start, play, a test of what was learned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from training_runs import ROOT, train

from megarlx.cli import main
from megarlx.training.metrics import read_metrics

RECIPES = ROOT / "configs" / "recipes"

CONFIG = """
[model]
family = "olmo2"
vocab_size = 150
hidden_size = 24
layers = 2
heads = 2
intermediate_size = 40
max_sequence_length = 128

[training]
sequences_per_step = 4
sequences_per_microbatch = 2
sequence_length = 128

[template]
user = "seen : {{content}} act :"
assistant = " {{content}}"

[data]
maker = "agents"
folder = "{world}"
[[data.options.environments]]
function = "sokoban"
max_turns = 4
tasks = 20
test_tasks = 4
demonstrations = 10
[[data.options.environments]]
function = "calculator"
tasks = 20
test_tasks = 4
demonstrations = 10

[sft]

[rl]
prompts = "{{made}}/sokoban/tasks_train.jsonl"
prompts_per_step = 3
samples_per_prompt = 4
policy = {{ preset = "sampo" }}
keep_samples_every_steps = 2
[rl.environment]
function = "sokoban"
workers = 1
max_turns = 4
max_turn_tokens = 4
max_episode_tokens = 110

[[stages]]
steps = 3
[stages.objectives.sft]
lr = 4e-4
[[stages]]
steps = 4
[stages.objectives.rl]
lr = 4e-4

[checkpoints]
save_every_steps = 5

[logging]
log_every_steps = 1

[evaluation]
at_end = true
[[evaluation.suites]]
name = "sokoban"
kind = "agent"
made = "sokoban"
samples = 2
[evaluation.suites.environment]
function = "sokoban"
workers = 0
max_turns = 4
max_turn_tokens = 4
max_episode_tokens = 110
"""


def test_a_cold_start_and_play_in_one_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, world, out = tmp_path / "agent.toml", tmp_path / "world", tmp_path / "run"
    config.write_text(CONFIG.format(world=world))
    assert train(config, out) == 0
    lines = list(read_metrics(out / "metrics.jsonl"))
    played = [line for line in lines if "rl/success_sokoban" in line]
    assert [line["step"] for line in played] == [4, 5, 6, 7]
    for line in played:
        assert 0 <= line["rl/valid_actions_sokoban"] <= 1
        assert 1 <= line["rl/turns_sokoban"] <= 4
        assert {"rl/clip_fraction", "rl/entropy", "rl/kl", "grad_norm/rl"} <= line.keys()
    result = json.loads((out / "evaluations" / "iter_00000007.sokoban.json").read_text())
    assert len(result["items"]) == 4
    assert result["kind"] == "agent"
    samples = sorted(path.name for path in (out / "samples").iterdir())
    assert samples == [
        "iter_00000003.rl-readiness.jsonl",
        "iter_00000007.sokoban.jsonl",
        "step_00000000.rl.jsonl",
        "step_00000002.rl.jsonl",
    ]
    (first, *_) = map(json.loads, (out / "samples" / samples[2]).read_text().splitlines())
    assert first["completion"].startswith("did: ")
    # What is there is not written again, and never in another way.
    made = (world / "agents.words").stat().st_mtime_ns
    assert train(config, tmp_path / "other", "stages.1.steps=1") == 0
    assert (world / "agents.words").stat().st_mtime_ns == made
    more = "data.options.environments.0.tasks=21"
    assert train(config, tmp_path / "third", more, "stages.1.steps=1") == 1
    assert "use another folder" in capsys.readouterr().err
    tasks = (world / "sokoban" / "tasks_train.jsonl").read_text().splitlines()
    assert len(tasks) == 20


def test_a_run_goes_on_inside_of_a_rollout_bit_for_bit(tmp_path: Path) -> None:
    config, whole, part = tmp_path / "agent.toml", tmp_path / "whole", tmp_path / "part"
    config.write_text(CONFIG.format(world=tmp_path / "world"))
    moving = ("rl.steps_per_rollout=2", "rl.epochs_per_rollout=2")
    assert train(config, whole, *moving) == 0
    # As a run that was killed behind its checkpoint of step 5, the second of a rollout's four.
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "iter_00000007")
    for file in ("samples", "evaluations"):
        shutil.rmtree(part / file)
    assert train(config, part, *moving) == 0
    timed = ("perf/", "cost/seconds")
    one, other = (
        [
            {k: v for k, v in line.items() if not k.startswith(timed)}
            for line in read_metrics(run / "metrics.jsonl")
            if "loss/sft" in line or "loss/rl" in line
        ]
        for run in (whole, part)
    )
    assert [line["step"] for line in other] == list(range(1, 8))
    assert one == other
    name = "iter_00000007.sokoban.json"
    items = [json.loads((r / "evaluations" / name).read_text())["items"] for r in (whole, part)]
    assert items[0] == items[1]


@pytest.mark.parametrize(
    ("recipe", "objectives"), [("sampo", ["rl"]), ("agent_parallel", ["rl", "sft"])]
)
def test_excursions_of_agents_start_from_any_checkpoint(
    tmp_path: Path, recipe: str, objectives: list[str]
) -> None:
    config, trunk, out = tmp_path / "agent.toml", tmp_path / "trunk", tmp_path / recipe
    config.write_text(CONFIG.format(world=tmp_path / "world"))
    assert train(config, trunk, "stages.0.steps=1", "stages.1.steps=1") == 0
    small = {
        "stages.0.steps": 2,
        "rl.prompts_per_step": 2,
        "rl.samples_per_prompt": 3,
        "rl.environment.max_turns": 3,
        "rl.environment.max_episode_tokens": 90,
        **{f"stages.0.objectives.{name}.warmup_steps": 0 for name in objectives},
    }
    words = ["branch", f"{trunk}@latest", str(RECIPES / f"{recipe}.toml"), "--out", str(out)]
    for key, value in small.items():
        words += ["--set", f"{key}={value}"]
    assert main(words) == 0
    lines = [line for line in read_metrics(out / "metrics.jsonl") if "loss/rl" in line]
    assert [line["step"] for line in lines] == [1, 2]  # every step of RL; of others one in ten
    assert "loss/sft" not in lines[0]
    assert ("loss/sft" in lines[1]) == ("sft" in objectives)
    assert all(line["rl/turns_sokoban"] <= 3 for line in lines)
    parent = json.loads((out / "lineage.json").read_text())["parent"]
    assert parent["iteration"] == 2
    assert (out / "evaluations" / "iter_00000002.sokoban.json").exists()


def test_a_broken_environment_stops_the_run_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, world = tmp_path / "agent.toml", tmp_path / "world"
    config.write_text(CONFIG.format(world=world))
    broken = "rl.environment.options.level=huge"
    assert train(config, tmp_path / "run", broken, "stages.0.steps=1") == 1
    said = capsys.readouterr().err
    assert "could not start: ValueError: sokoban: level is 'huge'" in said
    assert "Traceback" not in said
