"""The native build: one shared object per instruction set, and errors that say what to do."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from megarlx.ops import native

ROOT = Path(__file__).resolve().parents[2]
INSTRUCTION_SETS = native.load().built_with["instruction_sets"]


def library(instruction_set: str) -> str:
    spec = find_spec(f"megarlx._cpu_{instruction_set}")
    assert spec is not None
    assert spec.origin is not None
    return spec.origin


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_a_kernel_library_exports_only_its_table(instruction_set: str) -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    lines = run("nm", "-D", "--defined-only", library(instruction_set)).stdout.splitlines()
    names = {line.split()[-1] for line in lines} - {"__bss_start", "_edata", "_end"}  # the linker's
    assert names == {"megarlx_cpu_kernels"}


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_no_instruction_of_a_larger_set_leaks_into_a_library(instruction_set: str) -> None:
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    code = run("objdump", "-d", "--no-show-raw-insn", library(instruction_set)).stdout
    assert "<megarlx_cpu_kernels>" in code
    uses_512 = bool(re.search(r"%zmm\d|%k[1-7]\b", code))
    uses_256 = bool(re.search(r"%ymm\d", code))
    assert uses_512 == (instruction_set == "avx512")
    assert uses_256 == (instruction_set in ("avx2", "avx512"))


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_torch_decides_which_instruction_set_is_loaded(instruction_set: str) -> None:
    machine = torch.backends.cpu.get_cpu_capability().lower()
    if INSTRUCTION_SETS.index(instruction_set) > INSTRUCTION_SETS.index(machine):
        pytest.skip(f"this machine has no {instruction_set}")
    code = "import megarlx.ops.native as n; print(n.load().instruction_set)"
    done = run(sys.executable, "-c", code, ATEN_CPU_CAPABILITY=instruction_set)
    assert done.stdout.strip() == instruction_set, done.stderr


def test_another_torch_than_the_one_built_against_is_refused_with_the_rebuild_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built_with = {**native.load().built_with, "torch": "2.0.0"}
    monkeypatch.setattr(native, "_built_with", lambda: built_with)
    with pytest.raises(
        ImportError, match=r"(?s)against torch 2\.0\.0.*setup\.py build_ext --inplace"
    ) as e:
        native.load.__wrapped__()
    assert torch.__version__ in str(e.value)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"CXX": "no-such-compiler"},
            r"no C\+\+ compiler: 'no-such-compiler'.*apt-get install g\+\+",
        ),
        ({"MEGARLX_CUDA": "yes"}, r"MEGARLX_CUDA is 'yes'; allowed are 0 and 1"),
    ],
)
def test_a_build_that_cannot_work_says_what_is_missing(
    environment: dict[str, str], message: str
) -> None:
    done = run(sys.executable, "setup.py", "build_ext", "--inplace", **environment)
    assert done.returncode != 0
    assert re.search(message, done.stderr, re.DOTALL), done.stderr


def test_a_build_without_torch_says_so_and_downloads_nothing() -> None:
    code = (
        "import sys, setuptools, subprocess, runpy\n"
        "sys.modules['torch'] = None\n"
        "subprocess.run = lambda *a, **k: type('Done', (), {'stdout': ''})()\n"
        "sys.argv = ['setup.py', 'build_ext', '--inplace']\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    done = run(sys.executable, "-c", code)
    assert done.returncode != 0
    assert re.search("no torch to build against.*pip install 'torch==", done.stderr), done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build")
def test_asking_for_cuda_beside_a_cpu_torch_is_refused_by_name() -> None:
    done = run(sys.executable, "setup.py", "build_ext", "--inplace", MEGARLX_CUDA="1")
    assert done.returncode != 0
    assert re.search("no nvcc|is a CPU build", done.stderr), done.stderr
