"""Stage build: what this machine has, the native code compiled on it, the doctor, one call each."""

from __future__ import annotations

import json
import os
import platform
import shutil
from pathlib import Path

import torch

from gpu.clock import speeds
from gpu.pieces import Absent, Context, Failed, Piece, Result, call, python, version

DISTRIBUTIONS = (
    *("torch", "triton", "numpy", "pydantic", "transformers", "nvidia-cublas", "nvidia-cudnn-cu13"),
    *("nvidia-nccl-cu13", "transformer-engine", "transformer-engine-torch", "flash-attn"),
    *("flash-attn-4", "fa4", "flashinfer-python", "liger-kernel", "trl", "vllm", "mpi4py"),
)
TOOLS = ("nvcc", "compute-sanitizer", "ncu", "cuobjdump", "nvidia-smi", "ninja", "c++")


def environment(context: Context) -> Result:
    found: Result = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in DISTRIBUTIONS},
        "tools": {name: shutil.which(name) or "absent" for name in TOOLS},
    }
    if context.device.type == "cuda":
        card = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": card.name,
            "capability": f"{card.major}.{card.minor}",
            "memory_gib": round(card.total_memory / 2**30, 1),
            "multiprocessors": card.multi_processor_count,
            "l2_mib": round(card.L2_cache_size / 2**20, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
        if shutil.which("nvidia-smi") is not None:
            query = "driver_version,clocks.max.sm,clocks.max.mem,power.limit,mig.mode.current"
            code, output = call(["nvidia-smi", f"--query-gpu={query}", "--format=csv"], 30)
            found["nvidia_smi"] = output.strip() if code == 0 else f"ended with {code}"
    print(json.dumps(found, indent=1))
    return found


def compiled(context: Context) -> Result:
    """setup.py build_ext, as a user runs it; on a CPU only what is built is looked at."""
    look = python("-c", "from megarlx.ops.native import load; print(load().built_with['cuda'])")
    log = ""
    if context.device.type == "cuda":
        command = python("setup.py", "build_ext", "--inplace")
        variables = {"MEGARLX_CUDA": "1", "MAX_JOBS": str(min(os.cpu_count() or 1, 16))}
        code, log = call(command, context.seconds_left() - 20, variables=variables)
        if code != 0:
            raise Failed(f"build_ext ended with {code}", {"log": log[-4000:]})
    code, output = call(look, context.seconds_left())
    built = output.strip().splitlines()[-1] if code == 0 else f"the import ended with {code}"
    if code != 0 or (context.device.type == "cuda" and built == "None"):
        raise Failed(f"the native code has CUDA: {built}", {"log": log[-4000:]})
    warnings = sum("warning" in line for line in log.splitlines())
    return {"cuda": built, "warnings": warnings}


def doctor(context: Context) -> Result:
    code, output = call(python("-m", "megarlx", "doctor"), context.seconds_left())
    if code is None:
        raise Failed("megarlx doctor did not end", {"output": output})
    return {"status": code, "output": output.splitlines()}


def smoke(context: Context) -> Result:
    """Each kernel once, and which attention the model would use."""
    from gpu.kernels_once import run_all

    done = run_all(context.device)
    found: Result = {"kernels": done}
    if context.device.type == "cuda":
        from megarlx.model.attention import _flash

        torch.cuda.synchronize()
        flash = _flash()
        found["flash_attention"] = "absent: SDPA" if flash is None else flash.version
    return found


def packages(context: Context) -> Result:
    """The packages' own smoke test, where MEGARLX_GPU_SMOKE names it."""
    name = os.environ.get("MEGARLX_GPU_SMOKE")
    if not name or not Path(name).exists():
        raise Absent("MEGARLX_GPU_SMOKE names no smoke test of the packages")
    code, output = call(python(name), context.seconds_left())
    lines = output.splitlines()
    if code != 0 or any(line.startswith(("BAD", "FAIL")) for line in lines):
        raise Failed("a package's kernel is wrong or does not run", {"output": lines})
    return {"output": lines}


def machine_speeds(context: Context) -> Result:
    return speeds(context.device, context.small)


PIECES = [
    Piece("environment", 40, environment),
    Piece("compile", 200, compiled),
    Piece("speeds", 30, machine_speeds),
    Piece("smoke", 40, smoke),
    Piece("doctor", 60, doctor),
    Piece("packages", 60, packages),
]
