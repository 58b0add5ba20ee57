"""Runs in processes of their own that tests kill, and what must be true of what they leave."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "end_to_end"))
from training_runs import command, environment, losses, run, tensors

from megarlx.checkpoint import iterations, latest, read_manifest, verify

# How so many processes are laid out.
LAYOUTS = {
    1: (),
    2: ("layout.data=2",),
    4: ("layout.tensor=2", "layout.data=2"),
}


def settings(steps: int, processes: int = 1) -> tuple[str, ...]:
    """A checkpoint at every second step: about as much saving as training."""
    return (
        *LAYOUTS[processes],
        f"training.steps={steps}",
        "checkpoints.save_every_steps=2",
        "checkpoints.keep_last=2",
        "logging.validate_every_steps=10",
    )


@contextmanager
def started(words: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process with its output in one pipe; whatever the test does, nothing of it stays."""
    process = subprocess.Popen(
        words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        kill_tree(process)
        assert process.stdout is not None
        process.stdout.close()


def children(pid: int) -> list[int]:
    """Everything that a process started, and what that started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended since the folder was listed
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def kill_tree(process: subprocess.Popen[str]) -> None:
    """kill -9 of a launcher and of its workers, which are in sessions of their own."""
    if process.poll() is not None:
        return
    # The launcher stands still while its workers are looked up, so that it starts no new ones.
    process.send_signal(signal.SIGSTOP)
    for pid in (*children(process.pid), process.pid):
        with_signal(pid, signal.SIGKILL)
    process.wait()


def with_signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it was faster
        os.kill(pid, number)


def until_step(process: subprocess.Popen[str], step: int) -> list[str]:
    """Reads the output until a line tells of this step or a later one."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step ") and int(line.split()[1].partition("/")[0]) >= step:
            return lines
    raise AssertionError(f"it ended before step {step}:\n{''.join(lines)}")


def newest_complete(out: Path) -> Path | None:
    """What a restart will go on from; every checkpoint that has its name is whole to the byte."""
    with warnings.catch_warnings():
        # The kill may come between a checkpoint's name and `latest`.
        warnings.simplefilter("ignore")
        found = latest(out / "checkpoints")
    for iteration in iterations(out / "checkpoints"):
        verify(out / "checkpoints" / f"iter_{iteration:08d}")
    return found


def kill_again_and_again(
    config: Path,
    out: Path,
    *,
    steps: int,
    kills: int,
    seed: int,
    processes: int = 1,
    longest_wait: float = 0.1,
) -> None:
    """Starts a run and kills it at `kills` moments spread over its steps, then lets it end."""
    draw, overrides = random.Random(seed), settings(steps, processes)
    resumed: Path | None = None
    for number in range(kills):
        background = draw.choice(("true", "false"))
        words = command(
            config,
            out,
            *overrides,
            f"checkpoints.in_background={background}",
            processes=processes,
        )
        with started(words) as process:
            said = until_step(process, max(1, number * (steps - 8) // kills + draw.randint(1, 4)))
            time.sleep(draw.uniform(0.0, longest_wait))
            assert process.poll() is None, "".join(said)
            kill_tree(process)
            assert process.returncode == -signal.SIGKILL
        check_resumed_from(resumed, "".join(said))
        resumed = newest_complete(out)
    done = run(command(config, out, *overrides, processes=processes))
    assert done.returncode == 0, done.stdout + done.stderr
    check_resumed_from(resumed, done.stdout)


def check_resumed_from(checkpoint: Path | None, said: str) -> None:
    if checkpoint is None:
        assert "going on from" not in said
    else:
        assert f"going on from {checkpoint}," in said


def check_same(one: Path, other: Path, step: int) -> None:
    """Weights, moments, cursors and the losses on the way, bit for bit."""
    assert tensors(one, step) == tensors(other, step) != {}
    name = f"iter_{step:08d}"
    states = [read_manifest(run / "checkpoints" / name).state for run in (one, other)]
    for state in states:
        del state["run"]["cost"]  # seconds are its own
    assert states[0] == states[1]
    assert losses(one) == losses(other)
