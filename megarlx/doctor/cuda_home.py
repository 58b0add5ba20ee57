"""Where the CUDA toolkit lies. The `nvcc` on PATH may be a wrapper that lies somewhere else.

setup.py reads this file before anything is installed: standard library only, no import of ours.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

HEADER = Path("include", "cuda_runtime.h")
NVCC = Path("bin", "nvcc")
USUAL = Path("/usr/local/cuda")
GIVEN = ("CUDA_HOME", "CUDA_PATH")


@dataclass(frozen=True)
class CudaHome:
    """The toolkit's root; None: there is none, and `looked` says where and what was missing."""

    path: Path | None
    looked: tuple[str, ...] = ()
    nvcc_on_path: str | None = None

    @property
    def nvcc(self) -> str | None:
        return str(self.path / NVCC) if self.path is not None else None


def find_cuda_home(environment: Mapping[str, str] | None = None, usual: Path = USUAL) -> CudaHome:
    """CUDA_HOME where it is given; else from the nvcc on PATH, by its place or by its own word;
    else the usual place. A root has both nvcc and the runtime's header."""
    environment = os.environ if environment is None else environment
    on_path = shutil.which("nvcc", path=environment.get("PATH"))
    looked: dict[Path, str] = {}
    for place, source in _places(environment, on_path, usual):
        missing = [str(part) for part in (NVCC, HEADER) if not (place / part).exists()]
        if not missing:
            return CudaHome(place, tuple(looked.values()), on_path)
        looked.setdefault(place, f"{place} ({source}) has no {' and no '.join(missing)}")
    return CudaHome(None, tuple(looked.values()), on_path)


def _places(
    environment: Mapping[str, str], on_path: str | None, usual: Path
) -> Iterator[tuple[Path, str]]:
    for name in GIVEN:
        if given := environment.get(name):
            yield Path(given), name
            return
    if on_path is not None:
        yield Path(on_path).absolute().parents[1], f"of {on_path}"
        yield Path(on_path).resolve().parents[1], f"of {on_path}, links followed"
        if told := _top_of(on_path):
            yield told, f"as {on_path} --dryrun says"
    yield usual, "the usual place"


def _top_of(nvcc: str) -> Path | None:
    """What nvcc itself takes for its root; a wrapper hands the question on."""
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None  # what it says is one of several ways to the place
    found = re.search(r"^#\$ TOP=(.+)$", done.stderr, re.MULTILINE)
    return Path(os.path.normpath(found[1].strip())) if found else None
