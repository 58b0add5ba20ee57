"""Loads the compiled library: checks it against the running torch, chooses the instruction set."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

REBUILD = "python setup.py build_ext --inplace   (or: pip install --no-build-isolation -e .)"


# Parameters of glibc's mallopt, and what they are set to, in bytes. Larger blocks than the second
# go back to the system at once, as they would anyway.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES, MMAP_BYTES = 128 << 20, 32 << 20


@dataclass(frozen=True)
class Native:
    """What was loaded: the instruction set in use and how the library was built."""

    instruction_set: str
    built_with: dict
    own_products: bool  # in fp32 on the CPU


def _built_with() -> dict:
    path = Path(__file__).resolve().parents[1] / "_build.json"
    if not path.exists():
        raise ImportError(
            f"megarlx's native code is not built ({path} is missing). Run:\n  {REBUILD}"
        )
    return json.loads(path.read_text())


def keep_freed_memory() -> None:
    """What a step frees, the next step gets back with its pages in place.

    glibc would return it to the system again and again, and a step would fault it in anew. Other
    allocators, and who set glibc's by the environment, are left alone.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


@functools.cache
def load() -> Native:
    keep_freed_memory()
    built_with = _built_with()
    if built_with["torch"] != torch.__version__:
        raise ImportError(
            f"megarlx was built against torch {built_with['torch']}, but torch {torch.__version__} "
            f"is running. Rebuild it:\n  {REBUILD}"
        )
    wanted = torch.backends.cpu.get_cpu_capability().lower()
    name = wanted if wanted in built_with["instruction_sets"] else "default"
    library = importlib.util.find_spec(f"megarlx._cpu_{name}")
    if library is None or library.origin is None:
        raise ImportError(
            f"megarlx: the CPU kernels for '{name}' are missing (built: "
            f"{', '.join(built_with['instruction_sets'])}). Run:\n  {REBUILD}"
        )
    extension = importlib.import_module("megarlx._C")
    instruction_set = extension.load_cpu_kernels(library.origin).lower()
    return Native(instruction_set, built_with, extension.own_products())
