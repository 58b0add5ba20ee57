"""Whether what a run would use computes on this machine's GPU: tried, each in its own process.

A machine may have two cuDNNs, one with torch and one of the system. Whichever is loaded first
decides, and parts of the other do not fit: imports still work then, and attention fails.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from megarlx.choices import (
    Choice,
    Machine,
    Needs,
    Package,
    choose_attention,
    choose_layers,
    choose_precision,
    flash_of,
)
from megarlx.doctor.findings import Finding, pip_install, rebuild
from megarlx.doctor.look import Look, installed_version, try_out
from megarlx.doctor.machine import Nvidia

FLASH = {
    "flash_attn_interface": "3",
    "flash_attn.cute": "4",
    "flash_attn.flash_attn_interface": "2",
}
PATHS = "LD_LIBRARY_PATH"
OF_CUDNN = ("cudnn", "SUBLIBRARY", "undefined symbol")


def check_card(
    looks: Mapping[str, Look], nvidia: Nvidia, *, cuda_ops: bool, time_limit_seconds: float
) -> list[Finding]:
    """Trials of what is installed; nothing where torch cannot use a GPU."""
    if not nvidia.gpus or not looks["torch"].facts.get("cuda_available"):
        return []
    found = []
    if looks["transformer_engine.pytorch"].ok:
        found.append(_fused_attention(time_limit_seconds))
    if looks["flash_attn.flash_attn_interface"].ok:
        version = installed_version("flash-attn") or "2.8.3"
        mend = f"--no-build-isolation --force-reinstall --no-deps flash-attn=={version}"
        found.append(_tried("FlashAttention call", time_limit_seconds, pip_install(mend)))
    if cuda_ops:
        found.append(_tried("CUDA kernel", time_limit_seconds, rebuild(before="MEGARLX_CUDA=1 ")))
    return found


def _tried(trial: str, time_limit_seconds: float, mend: str) -> Finding:
    look = try_out(trial, time_limit_seconds)
    if look.ok:
        return Finding(trial, "ok", "computes on the GPU")
    return Finding(trial, "broken", look.error, mend)


def _fused_attention(time_limit_seconds: float) -> Finding:
    part = "fused attention"
    look = try_out(part, time_limit_seconds)
    if look.ok:
        return Finding(part, "ok", f"computes on the GPU, with {look.facts['cudnn']}")
    if given := os.environ.get(PATHS):
        plain = {key: value for key, value in os.environ.items() if key != PATHS}
        if try_out(part, time_limit_seconds, plain).ok:
            detail = f"{look.error}; without {PATHS}={given} it computes: there are two cuDNNs"
            return Finding(part, "broken", detail, f"unset {PATHS}")
    detail = look.error
    mend = pip_install("--force-reinstall --no-deps transformer-engine-torch")
    if any(word in detail for word in OF_CUDNN):
        detail += " (torch's cuDNN and another one of this machine do not fit together)"
        mend = "ldconfig -p | grep libcudnn   (take the system's away, or make it torch's version)"
    return Finding(part, "broken", detail, f"{mend}; until then --set training.attention=sdpa")


def check_auto(looks: Mapping[str, Look], nvidia: Nvidia) -> list[Finding]:
    """What `auto` becomes here for a model with heads of 128, and why."""
    machine = _machine(looks, nvidia)
    precision = choose_precision(machine)
    needs = Needs(precision.value, head_dim=128)
    choices: dict[str, Choice] = {
        "precision": precision,
        "layers": choose_layers(machine, needs),
        "attention": choose_attention(machine, needs),
    }
    return [Finding(f"training.{key}", "ok", f"auto: {it}") for key, it in choices.items()]


def _machine(looks: Mapping[str, Look], nvidia: Nvidia) -> Machine:
    if not nvidia.gpus or not looks["torch"].facts.get("cuda_available"):
        return Machine()
    gpu = nvidia.gpus[0]
    engine = looks["transformer_engine.pytorch"]
    flash = next((FLASH[name] for name in FLASH if looks[name].ok), "")
    flash = flash or flash_of(looks["torch"].facts["version"])
    major, minor = gpu.capability
    return Machine(
        gpu.name,
        (major, minor),
        Package(installed_version("transformer-engine") or "?" if engine.ok else "", engine.error),
        Package(flash),
    )
