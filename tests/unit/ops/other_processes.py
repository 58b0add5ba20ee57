"""Tests and programs in processes of their own: on other instruction sets, with other threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# What each is compiled for (setup.py). torch takes the one that it is told, and a CPU that does not
# have it then ends the process.
NEEDED = {
    "default": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
}


def of_this_cpu() -> tuple[str, ...]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = {flag for line in lines if line.startswith("flags") for flag in line.split()}
    return tuple(name for name, needed in NEEDED.items() if needed <= flags)


INSTRUCTION_SETS = of_this_cpu()
TESTS = """
import sys
import pytest
from megarlx.ops import native
print(native.load().instruction_set)
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-k", sys.argv[2], sys.argv[1]]))
"""


def start_tests(instruction_set: str, file: str, chosen: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", TESTS, file, chosen],
        env=os.environ | {"ATEN_CPU_CAPABILITY": instruction_set},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def passed_on(run: subprocess.Popen[str]) -> str:
    """The instruction set that this CPU took."""
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0, said
    return said.split()[0]


def printed_with_threads(program: str) -> list[str]:
    """What it prints with 1, 2 and 7 threads, whose number is its argument."""
    return [
        subprocess.run(
            [sys.executable, "-c", program, str(threads)],
            env=os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "7"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in (1, 2, 7)
    ]
