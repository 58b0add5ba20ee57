"""torch, what it was built with, and whether that fits this machine."""

from __future__ import annotations

import os

from megarlx.doctor.findings import Finding, pip_install, rebuild
from megarlx.doctor.look import Look
from megarlx.doctor.machine import Nvidia, version_numbers
from megarlx.doctor.packages import broken

OLDEST_TORCH = (2, 11)


def check_torch(torch: Look, nvidia: Nvidia) -> list[Finding]:
    if torch.outcome == "absent":
        return [Finding("torch", "missing", "not installed", pip_install("torch"))]
    if not torch.ok:
        return [broken("torch", "torch", torch)]
    facts = torch.facts
    version = facts["version"]
    if version_numbers(version, 2) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        detail = f"{version} is too old; allowed are {oldest} and newer"
        return [Finding("torch", "mismatched", detail, pip_install(f"'torch>={oldest}'"))]
    detail = f"{version}, CPU kernels for {facts['cpu_capability']}, {facts['threads']} threads"
    return [Finding("torch", "ok", detail), check_cuda(torch, nvidia), check_nccl(torch)]


def check_cuda(torch: Look, nvidia: Nvidia) -> Finding:
    facts = torch.facts
    version, cuda = facts["version"], facts["cuda"]
    release = version.split("+")[0]
    if cuda is None and not nvidia.gpus:
        return Finding("torch CUDA", "absent", "torch is a CPU build, and there is no GPU")
    if cuda is None:
        return Finding(
            "torch CUDA",
            "mismatched",
            f"there is a GPU with driver {nvidia.driver}, but torch {version} is a CPU build",
            pip_install(f"--force-reinstall torch=={release}") + f" && {rebuild()}",
        )
    if not nvidia.gpus:
        return Finding("torch CUDA", "absent", f"built for CUDA {cuda}, but there is no GPU")
    if not facts["cuda_available"]:
        why = facts["cuda_error"] or "torch.cuda.is_available() is False"
        return Finding(
            "torch CUDA",
            "broken",
            f"built for CUDA {cuda}, but the GPU cannot be used: {why}",
            _cuda_mend(cuda, nvidia),
        )
    unfit = [g for g in nvidia.gpus if not runs_on(facts["architectures"], g.capability)]
    if unfit:
        return Finding(
            "torch CUDA",
            "mismatched",
            f"torch {version} has kernels for {', '.join(facts['architectures'])}; "
            f"{unfit[0].name} is {unfit[0].sm}",
            pip_install("--upgrade torch") + f" && {rebuild()}",
        )
    return Finding("torch CUDA", "ok", f"CUDA {cuda}, kernels: {' '.join(facts['architectures'])}")


def _cuda_mend(cuda: str, nvidia: Nvidia) -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"unset CUDA_VISIBLE_DEVICES   (it is '{visible}')"
    if nvidia.cuda and version_numbers(nvidia.cuda, 1) < version_numbers(cuda, 1):
        return (
            "sudo apt-get install cuda-drivers && sudo reboot   "
            f"(torch needs one for CUDA {cuda}, this one runs up to {nvidia.cuda})"
        )
    return "sudo modprobe nvidia_uvm && nvidia-smi   (then start again)"


def runs_on(architectures: list[str], capability: tuple[int, ...]) -> bool:
    """Whether kernels for these (`sm_90`, `sm_90a`, `compute_80`) run on a GPU of that capability.

    Machine code runs on its own major version from its minor upwards, and with a letter behind it
    nowhere else; code that is compiled at load (compute_…) runs on whatever is newer.
    """
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        digits = number.rstrip("af")
        major, minor = int(digits[:-1]), int(digits[-1])
        if kind == "compute":
            fits = (major, minor) <= capability
        elif digits != number:
            fits = (major, minor) == capability
        else:
            fits = major == capability[0] and minor <= capability[1]
        if fits:
            return True
    return False


def check_nccl(torch: Look) -> Finding:
    if torch.facts["nccl"]:
        return Finding("NCCL", "ok", torch.facts["nccl"])
    if torch.facts["cuda"] is None:
        return Finding("NCCL", "absent", "a CPU build of torch has none; gloo is used")
    return Finding(
        "NCCL",
        "missing",
        "this CUDA build of torch has no NCCL",
        pip_install(f"--force-reinstall torch=={torch.facts['version'].split('+')[0]}"),
    )


def check_gloo(torch: Look, gloo: Look) -> Finding:
    """A group of one is really made, because gloo depends on names and network interfaces."""
    if not torch.facts.get("gloo", False):
        mend = pip_install("--force-reinstall torch")
        return Finding("gloo", "missing", "this torch is built without it", mend)
    if gloo.ok:
        return Finding("gloo", "ok", "a process group was made")
    return Finding("gloo", "broken", gloo.error, "export GLOO_SOCKET_IFNAME=lo   (or eth0, …)")
