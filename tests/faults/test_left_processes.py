"""Nothing that a run started outlives it, whatever ended it."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Collection
from pathlib import Path

import pytest
from fault_runs import children, command, started, with_signal
from training_runs import write_config

SECONDS = 5.0  # for the kernel and a busy machine; what stays, stays for ever

# A trainer with one reward: its process has a child, and then never lets its interpreter go.
TRAINER = """
import sys
sys.path.insert(0, {folder!r})
from megarlx.config.reward import RewardConfig
from megarlx.rollouts.rewards.process import RewardPool
from megarlx.rollouts.rewards.sample import Sample
options = {{"said": {said!r}, "how": {how!r}}}
config = RewardConfig(function="lingering:reward", options=options, time_limit_seconds=1000)
RewardPool(config).score([Sample("", "")])
"""
LINGERING = """
import os, re, subprocess, time
def reward(samples, said, how):
    child = subprocess.Popen(["sleep", "1000"])
    with open(said + "~", "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    os.rename(said + "~", said)
    if how == "spin":
        re.match(r"(a+)+b", "a" * 60)  # holds the interpreter
    time.sleep(1000)
"""


def alive(process: int) -> bool:
    """A zombie has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def left(pids: Collection[int]) -> list[int]:
    limit = time.monotonic() + SECONDS
    while (found := [pid for pid in pids if alive(pid)]) and time.monotonic() < limit:
        time.sleep(0.02)
    for pid in found:
        with_signal(pid, signal.SIGKILL)
    return found


@pytest.mark.parametrize("how", ["spin", "sleep"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_rewards_and_what_they_started_end_with_their_trainer(
    tmp_path: Path, how: str, number: signal.Signals
) -> None:
    (tmp_path / "lingering.py").write_text(LINGERING)
    said = tmp_path / "said"
    code = TRAINER.format(folder=str(tmp_path), said=str(said), how=how)
    with started([sys.executable, "-c", code]) as trainer:
        while not said.exists():
            assert trainer.poll() is None
            time.sleep(0.02)
        pids = set(children(trainer.pid)) | {int(pid) for pid in said.read_text().split()}
        trainer.send_signal(number)
        trainer.wait(SECONDS)
    assert len(pids) == 2
    assert left(pids) == []


def test_when_memory_runs_out_a_reward_goes_before_the_trainer(tmp_path: Path) -> None:
    (tmp_path / "lingering.py").write_text(LINGERING)
    said = tmp_path / "said"
    code = TRAINER.format(folder=str(tmp_path), said=str(said), how="sleep")
    with started([sys.executable, "-c", code]) as trainer:
        while not said.exists():
            assert trainer.poll() is None
            time.sleep(0.02)
        for pid in said.read_text().split():
            assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n"
        own = Path("/proc/self/oom_score_adj").read_text()
        assert Path(f"/proc/{trainer.pid}/oom_score_adj").read_text() == own


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("left")
    return write_config(folder, folder / "world")


@pytest.mark.parametrize(
    "seconds", [0.0, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.05, 0.3, 1.0, 2.0))]
)
def test_workers_end_with_a_torchrun_that_is_killed_in_its_first_seconds(
    tmp_path: Path, config: Path, seconds: float
) -> None:
    words = command(config, tmp_path, "layout.data=2", processes=2)
    with started(words) as torchrun:
        while len(pids := children(torchrun.pid)) < 2:
            assert torchrun.poll() is None
            time.sleep(0.005)
        time.sleep(seconds)
        torchrun.kill()
        torchrun.wait(SECONDS)
    assert left(pids) == []
