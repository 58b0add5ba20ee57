"""Builds the native code for a machine with a card, on one without: `make cuda-prebuilt`.

    python3.12 tools/cuda_prebuilt.py [--out build/cuda-prebuilt] [--architectures 9.0]

Run it with the Python, torch and CUDA release that the other machine has. The folder then goes
there, and `benchmarks/gpu/first_minutes.sh --prebuilt` puts it into the package.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON, TORCH = "3.12", "2.11.0"
MOST_BYTES = 64 << 20
BRING_PYTHON = f"python{PYTHON} -m venv .venv-prebuilt"
BRING = {
    "torch": f"python -m pip install torch=={TORCH}",
    "c++": "apt-get install g++ (or dnf install gcc-c++)",
    "strip": "apt-get install binutils (or dnf install binutils)",
    **{name: f"python -m pip install {name}" for name in ("setuptools", "pybind11", "ninja")},
}


def site() -> Path:
    return Path(sysconfig.get_path("purelib"))


def cuda_of_torch() -> str | None:
    """The CUDA release of the installed torch; None for a build without."""
    import torch

    return torch.version.cuda


def toolkits() -> list[Path]:
    """Folders that hold a compiler and its headers. An nvcc on PATH may be a script elsewhere."""
    on_path = shutil.which("nvcc")
    found = [
        *([Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []),
        *([Path(on_path).resolve().parents[1]] if on_path else []),
        *(site() / "nvidia").glob("cu*"),
        Path("/usr/local/cuda"),
    ]
    return [
        path
        for path in found
        if (path / "bin" / "nvcc").exists() and (path / "include" / "cuda_runtime.h").exists()
    ]


def release_of(toolkit: Path) -> str:
    done = subprocess.run(
        [toolkit / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=False
    )
    match = re.search(r"release (\d+\.\d+)", done.stdout)
    return match[1] if match else "unknown"


def missing() -> list[str]:
    """What stands in the way, each with the command that mends it."""
    kind, release = platform.python_implementation(), platform.python_version()
    if kind != "CPython" or not release.startswith(f"{PYTHON}."):
        return [
            f"this is {kind} {release}; needed is CPython {PYTHON}: {BRING_PYTHON}; "
            "make cuda-prebuilt PREBUILT_PYTHON=.venv-prebuilt/bin/python"
        ]
    packages, programs = ("torch", "setuptools", "pybind11", "ninja"), ("c++", "strip")
    found = [f"{n} is missing: {BRING[n]}" for n in packages if not importlib.util.find_spec(n)]
    found += [f"{n} is not on PATH: {BRING[n]}" for n in programs if not shutil.which(n)]
    if importlib.util.find_spec("torch"):
        found += missing_beside_torch()
    return found


def missing_beside_torch() -> list[str]:
    import torch

    cuda = cuda_of_torch()
    if torch.__version__.split("+")[0] != TORCH:
        return [f"torch is {torch.__version__}; needed is {TORCH}: {BRING['torch']}"]
    if cuda is None:
        return [
            f"torch {torch.__version__} is a build for CPUs; needed is one for CUDA: "
            f"python -m pip install --force-reinstall torch=={TORCH}"
        ]
    found = toolkits()
    bring = (
        f"install the CUDA toolkit {cuda}, or: python -m pip install "
        f"'nvidia-cuda-nvcc=={cuda}.*' 'nvidia-cuda-crt=={cuda}.*' 'nvidia-nvvm=={cuda}.*' "
        f"'nvidia-cuda-cccl=={cuda}.*'"
    )
    if not found:
        return [f"there is no nvcc with include/cuda_runtime.h beside it: {bring}"]
    major = cuda.split(".")[0]
    releases = {str(path): release_of(path) for path in found}
    if not any(release.split(".")[0] == major for release in releases.values()):
        return [f"nvcc is {releases}; needed is release {major}, that of torch's CUDA: {bring}"]
    return []


def cuda_home(folder: Path, toolkit: Path) -> Path:
    """The toolkit with a lib64/libcudart.so to link against; packages have it under other names."""
    if (toolkit / "lib64" / "libcudart.so").exists():
        return toolkit
    runtime = sorted((site() / "nvidia").glob("*/lib/libcudart.so.*"))
    if not runtime:
        sys.exit("cuda-prebuilt: torch's packages hold no libcudart.so: " + BRING["torch"])
    (folder / "lib64").mkdir(parents=True)
    (folder / "lib64" / "libcudart.so").symlink_to(runtime[-1])
    for name in ("bin", "include", "nvvm"):
        if (toolkit / name).exists():
            (folder / name).symlink_to(toolkit / name)
    return folder


def build(out: Path, architectures: str) -> None:
    major = str(cuda_of_torch()).split(".")[0]
    toolkit = next(path for path in toolkits() if release_of(path).split(".")[0] == major)
    headers = [str(path) for path in sorted((site() / "nvidia").glob("*/include"))]
    library = ROOT / "build" / "cuda-prebuilt-lib"
    shutil.rmtree(library, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        variables = {
            "MEGARLX_CUDA": "1",
            "TORCH_CUDA_ARCH_LIST": architectures,
            "CUDA_HOME": str(cuda_home(Path(folder), toolkit)),
            "CPATH": os.pathsep.join([*headers, *filter(None, [os.environ.get("CPATH")])]),
            "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count() or 1)),
        }
        places = (f"--build-lib={library}", f"--build-temp={ROOT / 'build' / 'cuda-prebuilt-temp'}")
        done = subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build_ext", *places],
            cwd=ROOT,
            env={**os.environ, **variables},
            check=False,
        )
    if done.returncode != 0:
        sys.exit(f"cuda-prebuilt: setup.py build_ext ended with {done.returncode}")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(library / "megarlx", out)
    shutil.rmtree(library)
    made = sorted(out.glob("*.so"))
    subprocess.run(["strip", "-g", *made], check=True)
    size = sum(path.stat().st_size for path in out.iterdir())
    for path in sorted(out.iterdir()):
        print(f"{path.stat().st_size / 2**20:7.2f} MiB  {path.name}")
    if size > MOST_BYTES:
        sys.exit(f"cuda-prebuilt: {size / 2**20:.0f} MiB; at most {MOST_BYTES >> 20} may travel")
    print(f"cuda-prebuilt: {out}, {size / 2**20:.1f} MiB, for compute capability {architectures}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "cuda-prebuilt")
    parser.add_argument("--architectures", default="9.0", help="as TORCH_CUDA_ARCH_LIST says them")
    options = parser.parse_args()
    if problems := missing():
        print("\n".join(f"cuda-prebuilt: {problem}" for problem in problems), file=sys.stderr)
        return 1
    build(options.out.resolve(), options.architectures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
