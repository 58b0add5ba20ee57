"""The CPU ops, built with the address and undefined-behaviour sanitizers, find nothing to say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so.6")
SHARE = "0.1"  # of the tests of ops: each is some times slower
FUZZ_CALLS = "1000"
NEEDED = ("csrc", "megarlx", "tests/unit/ops", "tests/faults", "tests/end_to_end")
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "tests/conftest.py")


def runtimes() -> list[str]:
    """The compiler's own libraries, which have to be there before any other."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler} here")
    found = []
    for name in RUNTIMES:
        words = [compiler, f"-print-file-name={name}"]
        path = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(path).is_absolute():
            pytest.skip(f"{compiler} has no {name}")
        found.append(path)
    return found


def copy_of_the_tree(folder: Path) -> Path:
    for name in NEEDED:
        left_out = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, folder / name, ignore=left_out)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.mark.slow
def test_a_share_of_the_tests_of_ops_and_the_fuzz_run_clean_under_sanitizers(
    tmp_path: Path,
) -> None:
    preload = runtimes()
    tree = copy_of_the_tree(tmp_path / "tree")
    build = os.environ | {
        "CFLAGS": FLAGS,
        "LDFLAGS": FLAGS,
        "MAX_JOBS": "2",
        "MEGARLX_CUDA": "0",
    }
    words = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    made = subprocess.run(words, cwd=tree, env=build, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout[-4000:] + made.stderr[-4000:]
    env = os.environ | {
        "LD_PRELOAD": ":".join(preload),
        # Python and torch leave much behind when they end.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "1",
    }
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit/ops", "--share", SHARE]
    fuzz = ["tests/faults/fuzz_ops.py", "3", "0", FUZZ_CALLS]
    for words in (tests, fuzz):
        done = subprocess.run(
            [sys.executable, *words], cwd=tree, env=env, capture_output=True, text=True, check=False
        )
        said = done.stdout[-4000:] + done.stderr[-8000:]
        assert done.returncode == 0, said
        assert "runtime error" not in said
