"""No arguments make a CPU op crash, loop, or touch memory that is not its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fault_runs import environment
from fuzz_ops import OPS

MOST_FAILURES = 10  # enough to see what is wrong


def fuzz(seed: int, calls: int) -> tuple[list[str], Counter[str]]:
    """What ended the process, by call, and how often the ops took or refused their arguments."""
    program = str(Path(__file__).with_name("fuzz_ops.py"))
    failures: list[str] = []
    outcomes: Counter[str] = Counter()
    first = 0
    while first < calls and len(failures) < MOST_FAILURES:
        words = [sys.executable, program, str(seed), str(first), str(calls - first)]
        done = subprocess.run(words, env=environment(), capture_output=True, check=False)
        said = done.stdout.decode(errors="replace").splitlines()
        outcomes.update(line for line in said if line in ("ok", "refused"))
        if done.returncode == 0:
            break
        assert done.returncode < 0, done.stderr.decode(errors="replace")
        call = [line for line in said if line.startswith("call ")][-1]
        failures.append(f"{signal.Signals(-done.returncode).name}: {call}")
        first = int(call.split()[1]) + 1
    return failures, outcomes


@pytest.mark.parametrize(
    ("seed", "calls"), [(1, 2_000), pytest.param(2, 20_000, marks=pytest.mark.slow)]
)
def test_ops_take_their_arguments_or_refuse_them(seed: int, calls: int) -> None:
    failures, outcomes = fuzz(seed, calls)
    assert failures == []
    assert outcomes.total() == calls
    assert outcomes["ok"] > calls / 5
    assert outcomes["refused"] > calls / 3
    assert len(OPS) > 20
