"""Compiles every csrc/cuda/*.cu with plain nvcc for each architecture; fails on register spills.

No GPU and no CUDA torch are needed: the kernels include no torch header.

    python tools/cuda_check.py [--architectures 80 90 100] [--verbose]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What torch's own build adds, so that the kernels compile the same way in both.
FLAGS = [
    *("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v"),
    *("-D__CUDA_NO_HALF_OPERATORS__", "-D__CUDA_NO_HALF_CONVERSIONS__"),
    *("-D__CUDA_NO_BFLOAT16_CONVERSIONS__", "-D__CUDA_NO_HALF2_OPERATORS__"),
]


@dataclass(frozen=True)
class Kernel:
    """One line of ptxas' report."""

    name: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int


def parse_report(text: str) -> list[Kernel]:
    """Reads `ptxas -v`: a block a kernel, "Compiling entry function '…'" first."""
    kernels = []
    for block in re.split(r"Compiling entry function '", text)[1:]:
        spilled = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", block)
        used = re.search(r"Used (\d+) registers", block)
        shared = re.search(r"(\d+) bytes smem", block)
        if spilled is None or used is None:
            raise ValueError(f"cannot read this part of ptxas' report:\n{block[:400]}")
        kernels.append(
            Kernel(
                name=block.split("'")[0],
                registers=int(used[1]),
                shared_bytes=int(shared[1]) if shared else 0,
                stack_bytes=int(spilled[1]),
                spill_bytes=int(spilled[2]) + int(spilled[3]),
            )
        )
    return kernels


def readable(names: list[str]) -> list[str]:
    if shutil.which("c++filt") is None or not names:
        return names
    return subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()


def compile_one(nvcc: str, source: Path, architecture: str) -> tuple[int, str]:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                *(nvcc, *FLAGS, f"-I{ROOT / 'csrc'}", "-c", str(source)),
                *("-gencode", f"arch=compute_{architecture},code=sm_{architecture}"),
                *("-o", str(Path(folder) / "kernel.o")),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    return done.returncode, done.stdout + done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", nargs="+", default=["80", "90", "100"], metavar="SM")
    parser.add_argument("--verbose", action="store_true", help="print every kernel's registers")
    options = parser.parse_args()
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if nvcc is None:
        print("cuda-check: there is no nvcc on PATH; install the CUDA toolkit or set NVCC")
        return 1
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    if not sources:
        print("cuda-check: csrc/cuda holds no .cu file")
        return 1
    jobs = [(source, architecture) for source in sources for architecture in options.architectures]
    workers = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(lambda job: compile_one(nvcc, *job), jobs))
    failures = 0
    for (source, architecture), (code, output) in zip(jobs, results, strict=True):
        label = f"{source.name} sm_{architecture}"
        if code != 0:
            failures += 1
            print(f"FAIL {label}: nvcc stopped with {code}\n{output}")
            continue
        kernels = parse_report(output)
        spilling = [kernel for kernel in kernels if kernel.spill_bytes]
        failures += len(spilling)
        most = max((kernel.registers for kernel in kernels), default=0)
        verdict = "FAIL" if spilling else "ok  "
        print(f"{verdict} {label}: {len(kernels)} kernels, at most {most} registers")
        shown = kernels if options.verbose else spilling
        for kernel, name in zip(shown, readable([kernel.name for kernel in shown]), strict=True):
            print(
                f"     {kernel.registers:3d} registers, {kernel.shared_bytes} B shared, "
                f"{kernel.spill_bytes} B spilled, {kernel.stack_bytes} B stack: {name[:160]}"
            )
    print(f"cuda-check: {len(jobs)} compilations, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
