"""Compiles the rewritten kernels and bindings into one shared object, in three kinds.

    plain     with fused multiply-adds wherever the compiler finds them, as nvcc makes them
    address   the address sanitizer, and of undefined behaviour what makes a kernel wrong
    thread    the thread sanitizer

The sanitizers see the kernels only; bindings and torch are compiled without. Objects are kept by
the content of what they are made of, so bindings are compiled once for all kinds, and a second call
takes a second.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .rewrite import rewrite_tree

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
FOLDER = ROOT / "build" / "cuda_emulation"

# Kernels are compiled as for sm_90, and on x86-64 for a processor with fused multiply-adds.
DEVICE = ["-D__CUDACC__", "-D__CUDA_ARCH__=900", "-mavx2", "-mfma", "-fno-strict-aliasing"]
COMMON = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]


@dataclass(frozen=True)
class Kind:
    name: str
    flags: tuple[str, ...]
    """of the kernels"""
    macro: str = ""
    """of the engine"""
    preloaded: tuple[str, ...] = ()
    """libraries that have to be in the process before Python"""
    options: tuple[tuple[str, str], ...] = ()
    """of the sanitizers, as environment variables"""


UNDEFINED = "alignment,shift,signed-integer-overflow,float-cast-overflow,bounds"
KINDS = {
    kind.name: kind
    for kind in (
        Kind("plain", ("-ffp-contract=fast", "-fexpensive-optimizations")),
        Kind(
            "address",
            ("-ffp-contract=off", f"-fsanitize=address,{UNDEFINED}", "-fno-omit-frame-pointer"),
            "EMULATED_ADDRESS_SANITIZER",
            ("libasan.so", "libubsan.so", "libstdc++.so.6"),
            (
                ("ASAN_OPTIONS", "detect_leaks=0:abort_on_error=0"),
                ("UBSAN_OPTIONS", "print_stacktrace=1"),
            ),
        ),
        Kind(
            "thread",
            ("-ffp-contract=off", "-fsanitize=thread"),
            "EMULATED_THREAD_SANITIZER",
            ("libtsan.so", "libstdc++.so.6"),
            (("TSAN_OPTIONS", "ignore_noninstrumented_modules=1:exitcode=66"),),
        ),
    )
}


def compiler() -> str:
    return os.environ.get("CXX", "g++")


@functools.cache
def compiler_version() -> str:
    done = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0]


def content(source: Path, folders: Sequence[Path]) -> bytes:
    """`source` and every header of `folders` that it includes, each once."""
    seen: dict[Path, bytes] = {}

    def visit(path: Path) -> None:
        if path in seen:
            return
        seen[path] = path.read_bytes()
        for name in re.findall(rb'^\s*#include ["<]([^">]+)[">]', seen[path], re.MULTILINE):
            for folder in (path.parent, *folders):
                if (folder / name.decode()).exists():
                    visit((folder / name.decode()).resolve())
                    break

    visit(source)
    return b"\0".join(seen.values())


def digest(*parts: object) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part if isinstance(part, bytes) else repr(part).encode())
    return found.hexdigest()[:20]


def compile_object(source: Path, flags: Sequence[str], objects: Path, *others: object) -> Path:
    """The object of `source`, made unless one of the same content is there."""
    folders = [Path(flag[2:]) for flag in flags if flag.startswith("-I")]
    without_places = [flag for flag in flags if not flag.startswith("-I")]
    name = digest(content(source, folders), without_places, compiler_version(), *others)
    target = objects / f"{source.name.split('.')[0]}-{name}.o"
    if target.exists():
        return target
    part = target.with_suffix(f".{os.getpid()}")
    command = [compiler(), *flags, "-c", str(source), "-o", str(part)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    part.rename(target)
    return target


def torch_flags() -> tuple[list[str], list[str], str]:
    """(of the compiler, of the linker, torch's version)"""
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    headers = [part for path in include_paths() for part in ("-isystem", path)]
    (libraries, *_) = library_paths()
    link = [f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"]
    return [*headers, "-isystem", sysconfig.get_path("include")], link, torch.__version__


def check_machine() -> None:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        sys.exit(f"cuda_emulation: this machine is {platform.machine()}; allowed: x86-64")
    if shutil.which(compiler()) is None:
        sys.exit(f"cuda_emulation: the compiler '{compiler()}' is not on PATH; set CXX")


def build(kind: Kind, csrc: Path = CSRC, rewritten: Path | None = None) -> Path:
    """The shared object of the kernels of `csrc`; they are rewritten into `rewritten`."""
    check_machine()
    objects = FOLDER / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    source = FOLDER / "csrc" if rewritten is None else rewritten
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rewrite_tree(csrc, source)
        include = [f"-I{HERE / 'include'}", f"-I{source}"]
        headers, link, torch_version = torch_flags()
        engine = ["-O2", "-g1", "-Wall", *([f"-D{kind.macro}"] if kind.macro else [])]
        binding = ["-O1", "-DMEGARLX_CUDA", "-include", "emulated_products.h"]
        kernel = ["-O1", "-g1", "-fno-threadsafe-statics", *DEVICE, *kind.flags]
        jobs = [
            *((path, [*COMMON, *binding, *include, *headers]) for path in source.glob("*.cpp")),
            *((path, [*COMMON, *kernel, *include]) for path in source.glob("cuda/*.cu.cpp")),
            (HERE / "engine.cpp", [*COMMON, *engine]),
        ]
        # The largest first, so that the last one is not waited for alone.
        jobs.sort(key=lambda job: -job[0].stat().st_size)
        workers = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
        with ThreadPoolExecutor(workers) as pool:
            made = list(pool.map(lambda job: compile_object(*job, objects, torch_version), jobs))
        library = FOLDER / f"{kind.name}-{digest(sorted(path.name for path in made), link)}.so"
        if not library.exists():
            sanitizer = [flag for flag in kind.flags if flag.startswith("-fsanitize")]
            part = library.with_suffix(".part")
            command = [compiler(), "-shared", *sanitizer, *map(str, made), *link, "-o", str(part)]
            subprocess.run(command, check=True)
            part.rename(library)
    return library


def environment(kind: Kind) -> dict[str, str]:
    """The environment of a Python that loads this kind."""
    found = dict(os.environ, OMP_NUM_THREADS="1", **dict(kind.options))
    found["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    if kind.preloaded:
        libraries = [
            subprocess.run(
                [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
            ).stdout.strip()
            for name in kind.preloaded
        ]
        found["LD_PRELOAD"] = " ".join(libraries)
    return found


def why_not(kind: Kind) -> str | None:
    """Why this kind's sanitizer cannot start on this machine; None where it can."""
    done = subprocess.run(
        [sys.executable, "-c", "print('started')"],
        env=environment(kind),
        capture_output=True,
        text=True,
        check=False,
    )
    if (
        done.returncode == 0
        and "started" in done.stdout
        and "cannot be preloaded" not in done.stderr
    ):
        return None
    lines = (done.stderr.strip() or f"it ended with {done.returncode}").splitlines()
    return lines[0]
