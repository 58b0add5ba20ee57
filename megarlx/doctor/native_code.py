"""megarlx's own compiled code: whether it is built, for this torch and for these GPUs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megarlx.doctor.findings import Finding, State, rebuild
from megarlx.doctor.look import Look
from megarlx.doctor.machine import Nvidia
from megarlx.doctor.torch_stack import runs_on

BUILD_FILE = Path(__file__).resolve().parents[1] / "_build.json"

Build = Mapping[str, Any]


def read_build(path: Path = BUILD_FILE) -> Build | Finding | None:
    """How the native code was built; None where it was not; a finding where the file is no good."""
    try:
        build = json.loads(path.read_text())
        for key in ("torch", "cuda", "cuda_architectures"):
            build[key]
        ", ".join(build["instruction_sets"])  # a TypeError where these are not words
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        detail = f"{path}: {type(error).__name__}: {error}"
        return Finding("native ops", "broken", detail, rebuild())

    return build


def check_ops(build: Build | None, torch: Look, native: Look, nvidia: Nvidia) -> list[Finding]:
    if build is None:
        return [Finding("native ops", "missing", "megarlx._C is not built", rebuild())]
    running = torch.facts.get("version")
    if running is not None and build["torch"] != running:
        detail = f"built against torch {build['torch']}, but torch {running} is running"
        return [Finding("native ops", "mismatched", detail, rebuild())]
    if not native.ok:
        detail = native.error.splitlines()[0] if native.error else "megarlx.ops is not there"
        return [Finding("native ops", "broken", detail, rebuild())]
    detail = (
        f"built against torch {build['torch']} for {', '.join(build['instruction_sets'])}; "
        f"{native.facts['instruction_set']} in use"
    )
    return [Finding("native ops", "ok", detail), check_cuda_ops(build, torch, nvidia)]


def check_cuda_ops(build: Build, torch: Look, nvidia: Nvidia) -> Finding:
    part = "CUDA ops"
    if not nvidia.gpus or torch.facts.get("cuda") is None:
        built = f"built for {build['cuda_architectures']}" if build["cuda"] else "not built"
        return Finding(part, "absent", f"{built}; no GPU that this torch could use")
    wanted = ";".join(sorted({"{}.{}".format(*gpu.capability) for gpu in nvidia.gpus}))
    again = rebuild(before=f"MEGARLX_CUDA=1 TORCH_CUDA_ARCH_LIST='{wanted}' ")
    if build["cuda"] is None:
        return Finding(part, "mismatched", "there is a GPU, but only CPU ops are built", again)
    architectures = architectures_of(str(build["cuda_architectures"]))
    unfit = [g for g in nvidia.gpus if architectures and not runs_on(architectures, g.capability)]
    if unfit:
        detail = f"built for {build['cuda_architectures']}, but {unfit[0].name} is {unfit[0].sm}"
        return Finding(part, "mismatched", detail, again)
    return Finding(part, "ok", f"built with CUDA {build['cuda']} for {build['cuda_architectures']}")


def architectures_of(text: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST (`8.0;9.0a+PTX`) as torch names them; words like `Hopper` not."""
    found = []
    for major, minor, letter, ptx in re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", text):
        found.append(f"sm_{major}{minor}{letter}")
        if ptx:
            found.append(f"compute_{major}{minor}")
    return found


def check_index(built: bool, index: Look) -> Finding:
    if index.ok:
        return Finding("megarlx._index", "ok", "sample index and blending of token files")
    state: State = "broken" if built else "missing"
    return Finding("megarlx._index", state, index.error or "not built", rebuild())
