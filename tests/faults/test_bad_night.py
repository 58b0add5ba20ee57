"""RL through a night in which everything goes wrong once, and what it comes to.

The rewards hang and crash, the environment floods, the disk is full for a while, the run is killed:
what is lost depends on what the model said alone, so that the result is that of a night without a
kill and a full disk, bit for bit. A judge that is away for a time costs the samples of that time.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from fault_runs import (
    check_same,
    children,
    command,
    kill_tree,
    newest_complete,
    run,
    started,
    until_step,
    with_signal,
)
from training_runs import train

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "rollouts"))
from test_reward_http import serving

from megarlx.data.token_files import TokenFileWriter
from megarlx.training.metrics import read_metrics

NIGHTS = Path(__file__).with_name("nights.py")
CONFIG = """
[model]
family = "olmo2"
vocab_size = 257
hidden_size = 24
layers = 2
heads = 2
intermediate_size = 40
max_sequence_length = 96

[training]
sequences_per_step = 4
sequence_length = 96

[template]
user = "{{content}} "
assistant = "{{content}}"

[data]
tokenizer = "bytes"
sources = [{{ name = "text", prefix = "{folder}/text" }}]

[rl]
prompts = "{folder}/prompts.jsonl"
prompts_per_step = 4
samples_per_prompt = 4
max_completion_tokens = 6
reward_failures_allowed = 1.0
[[rl.rewards]]
function = "{nights}:reward"
options = {{ one_in = {one_in} }}
time_limit_seconds = 2.0
memory_limit_mb = 4096

[objectives.play.rl]
prompts = "{folder}/prompts.jsonl"
prompts_per_step = 2
samples_per_prompt = 4
policy = {{ preset = "sampo" }}
[objectives.play.rl.environment]
function = "{nights}:Flooding"
options = {{ one_in = 10 }}
max_turns = 3
max_turn_tokens = 6
max_episode_tokens = 80
allowed_failures = 1.0

[[stages]]
steps = {steps}
combine = "average"
[stages.objectives.rl]
lr = 1e-3
[stages.objectives.play]
lr = 1e-3

[evaluation]
readiness_prompts = 0

[checkpoints]
save_every_steps = 2

[logging]
log_every_steps = 1
"""


def write(folder: Path, steps: int, one_in: int) -> Path:
    lines = [{"question": f"w{number}", "answer": "1"} for number in range(40)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with TokenFileWriter(folder / "text", "u2") as writer:
        writer.add(list(range(200)))
    path = folder / "night.toml"
    path.write_text(CONFIG.format(folder=folder, nights=NIGHTS, one_in=one_in, steps=steps))
    return path


def lost(out: Path) -> dict[str, list[float]]:
    """By step, what each part lost."""
    lines = list(read_metrics(out / "metrics.jsonl"))
    keys = ("rl/reward_failures_reward", "rl/environment_failures_Flooding")
    return {
        key: [value for line in lines for name, value in line.items() if name.endswith(key[3:])]
        for key in keys
    }


def check_honest(out: Path, whole: Path, steps: int) -> None:
    check_same(out, whole, steps)
    counts = lost(out)
    assert counts == lost(whole)
    for key, values in counts.items():
        assert len(values) == steps, key
        assert 0 < sum(values) < 16 * steps / 2, key


class FullDisk:
    """From now on nothing is written to checkpoints of this iteration."""

    def __init__(self, iteration: int, monkeypatch: pytest.MonkeyPatch) -> None:
        write_bytes = os.write

        def full(file: int, data: Any) -> int:
            path = os.readlink(f"/proc/self/fd/{file}")
            if f"iter_{iteration:08d}" in path and path.endswith(".safetensors"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write_bytes(file, data)

        monkeypatch.setattr("megarlx.checkpoint.files.os.write", full)


def test_a_bad_night_ends_as_a_quiet_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = 6
    config, out, whole = write(tmp_path, steps, one_in=40), tmp_path / "out", tmp_path / "whole"
    assert train(config, whole) == 0
    with started(command(config, out)) as process:
        until_step(process, 2)
        kill_tree(process)
    FullDisk(4, monkeypatch)
    assert train(config, out) == 1
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    assert train(config, out) == 0
    check_honest(out, whole, steps)


@pytest.mark.slow
def test_a_long_bad_night_of_two_ranks_ends_as_a_quiet_one(tmp_path: Path) -> None:
    """Ranks are killed and brought back by torchrun, and torchrun itself is killed."""
    steps, kills, random_ = 40, 3, random.Random(1)
    config, out, whole = write(tmp_path, steps, one_in=100), tmp_path / "out", tmp_path / "whole"
    quiet = run(command(config, whole, "layout.data=2", processes=2), seconds=600)
    assert quiet.returncode == 0, quiet.stdout + quiet.stderr
    with started(command(config, out, "layout.data=2", processes=2)) as torchrun:
        until_step(torchrun, 8)
        kill_tree(torchrun)
    assert newest_complete(out) is not None
    words = command(config, out, "layout.data=2", processes=2, restarts=kills)
    with started(words) as torchrun:
        for number in range(kills):
            until_step(torchrun, 8 * (number + 2))
            ranks = [pid for pid in children(torchrun.pid) if _is_rank(pid)]
            with_signal(random_.choice(ranks), signal.SIGKILL)
            assert torchrun.stdout is not None
            assert any("going on from" in line for line in torchrun.stdout)
        said, _ = torchrun.communicate(timeout=300)
    assert torchrun.returncode == 0, said
    check_honest(out, whole, steps)


def _is_rank(pid: int) -> bool:
    """No process of a reward or an environment, whose loss would be a sample's."""
    return b"worker_program" not in Path(f"/proc/{pid}/cmdline").read_bytes()


JUDGED = """
[[rl.rewards]]
function = "judge"
options = {{ url = "{url}", retries = 0, timeout_seconds = 1.0 }}
samples_per_call = 16
"""


@pytest.mark.parametrize(
    ("steps", "away_seconds"), [(6, 0.0), pytest.param(2_000, 60.0, marks=pytest.mark.slow)]
)
def test_a_judge_that_is_away_costs_the_samples_of_that_time_and_no_more(
    tmp_path: Path, steps: int, away_seconds: float
) -> None:
    config = write(tmp_path, steps, one_in=10**9)
    text = config.read_text()
    rewards, rest = text.split("[objectives.play.rl]")
    rewards = rewards[: rewards.index("[[rl.rewards]]")]
    stages = rest[rest.index("[[stages]]") :].replace('combine = "average"\n', "")
    stages = stages.replace("[stages.objectives.play]\nlr = 1e-3\n", "")
    with serving() as judge:
        config.write_text(rewards + JUDGED.format(url=judge.url) + stages)
        # A batch of 16 that fails is asked for one by one, until it is hopeless.
        judge.behaviour = ["good"] * 2 + ["busy"] * 9 + ["good"]
        if away_seconds:
            judge.behaviour = ["good"] * 2 + ["busy"]
            back = threading.Timer(away_seconds, judge.behaviour.append, ("good",))
            back.start()
        assert train(config, tmp_path / "out") == 0
    lines = list(read_metrics(tmp_path / "out" / "metrics.jsonl"))
    failures = [line["rl/reward_failures_judge"] for line in lines if "loss/rl" in line]
    assert len(failures) == steps
    assert failures[:2] == [0, 0]
    assert failures[2] == 16
    assert failures[-1] == 0
    assert all(0 <= count <= 16 for count in failures)
