"""What this machine has, the doctor, each kernel once, and the native code compiled here."""

from __future__ import annotations

import json
import os
import platform
import shutil

import torch

from gpu.clock import speeds
from gpu.pieces import Context, Failed, Piece, Result, call, note, python, version

DISTRIBUTIONS = (
    *("torch", "triton", "numpy", "pydantic", "transformers", "nvidia-cublas", "nvidia-cudnn-cu13"),
    *("nvidia-nccl-cu13", "transformer-engine", "transformer-engine-torch", "flash-attn"),
    *("flash-attn-4", "fa4", "flashinfer-python", "liger-kernel", "trl", "vllm", "mpi4py"),
)
TOOLS = ("nvcc", "compute-sanitizer", "ncu", "cuobjdump", "nvidia-smi", "ninja", "c++")


def machine(context: Context) -> Result:
    """Versions, tools, the card and the two speeds that everything is compared with."""
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
        note(json.dumps(found["gpu"]))
        if shutil.which("nvidia-smi") is not None:
            query = "driver_version,clocks.max.sm,clocks.max.mem,power.limit,mig.mode.current"
            code, output = call(["nvidia-smi", f"--query-gpu={query}", "--format=csv"], 30)
            found["nvidia_smi"] = output.strip() if code == 0 else f"ended with {code}"
    print(json.dumps(found, indent=1))
    there = {name: v for name, v in found["versions"].items() if v != "absent"}
    note("versions " + json.dumps(there))
    found["speeds"] = speeds(context)
    copied, product = found["speeds"].values()
    note(f"copy {copied / 1e9:.4g} GB/s (read + write), product {product / 1e12:.4g} TFLOP/s")
    return found


def kernels_once(context: Context) -> Result:
    from gpu.kernels_once import run_all

    done = run_all(context.device)
    note(f"ran {', '.join(done)}")
    return {"kernels": done}


def doctor(context: Context) -> Result:
    """What it finds ill is a finding, and no failure of the suite."""
    code, output = call(python("-m", "megarlx", "doctor", "--json"), context.seconds_left())
    if code not in (0, 1):
        raise Failed(f"megarlx doctor ended with {code}", {"output": output[-3000:]})
    # Packages may have said something around it.
    findings = json.loads(output[output.index("{") : output.rindex("}") + 1])["findings"]
    for finding in findings:
        if finding["state"] not in ("ok", "absent"):
            note(f"doctor: {finding['part']} {finding['state']}: {finding['detail']}"[:300])
    return {"rows": [], "status": code, "findings": findings}


def compiled(context: Context) -> Result:
    """setup.py build_ext, as a user runs it, beside the native code that is in use.

    On a CPU only the latter is looked at.
    """
    look = python("-c", "from megarlx.ops.native import load; print(load().built_with['cuda'])")
    log, warnings = "", 0
    if context.device.type == "cuda":
        folders = (f"--build-lib={context.work / 'lib'}", f"--build-temp={context.work / 'temp'}")
        variables = {"MEGARLX_CUDA": "1", "MAX_JOBS": str(min(os.cpu_count() or 1, 16))}
        command = python("setup.py", "build_ext", *folders)
        code, log = call(command, context.seconds_left() - 10, variables=variables)
        if code != 0:
            raise Failed(f"build_ext ended with {code}", {"log": log[-4000:]})
        warnings = sum("warning" in line for line in log.splitlines())
    code, output = call(look, context.seconds_left())
    built = output.strip().splitlines()[-1] if code == 0 else f"the import ended with {code}"
    if code != 0 or (context.device.type == "cuda" and built == "None"):
        raise Failed(f"the native code has CUDA: {built}", {"log": log[-4000:]})
    note(f"compiles, {warnings} warnings; the native code in use was built for CUDA {built}")
    return {"cuda": built, "warnings": warnings}


PIECES = [
    Piece("machine", 4, machine),
    Piece("kernels-once", 5, kernels_once),
    Piece("doctor", 58, doctor),
    Piece("compile", 120, compiled),
]
