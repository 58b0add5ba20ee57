"""Random calls of every op on the emulated CUDA kernels, against the CPU's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from cuda_emulation.build import KINDS, environment, why_not  # noqa: E402


def agree(kind: str, seconds: int, seed: int) -> None:
    if (reason := why_not(KINDS[kind])) is not None:
        pytest.skip(f"the {kind} sanitizer does not start: {reason}")
    done = subprocess.run(
        [sys.executable, "-m", "cuda_emulation.random_cases", kind, str(seconds), str(seed)],
        env=environment(KINDS[kind]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_random_calls_agree_with_the_cpu(emulated_kernels: object) -> None:
    agree("plain", 5, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_many_random_calls_agree_with_the_cpu_under_each_sanitizer(kind: str) -> None:
    agree(kind, 60, 1000)
