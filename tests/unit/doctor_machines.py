"""Made-up machines for the doctor: packages, programs and a build of megarlx, all of them fake."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from megarlx.doctor.findings import Finding
from megarlx.doctor.packages import NEEDED, OPTIONAL

REPOSITORY = Path(__file__).resolve().parents[2]

FAKE_TORCH = """
import types
__version__ = {version!r}
version = types.SimpleNamespace(cuda={cuda!r})
backends = types.SimpleNamespace(cpu=types.SimpleNamespace(get_cpu_capability=lambda: "AVX2"))
get_num_threads = lambda: 2

def init():
    raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040)")

class Numbers:  # stands for any tensor on the GPU
    grad = property(lambda self: self)

    def __getattr__(self, name):
        return lambda *arguments, **options: self

    def __getitem__(self, place):
        return self

    def __setitem__(self, place, value):
        pass

    def __bool__(self):
        return True

    def tolist(self):
        return [0, 7]

zeros = randn = tensor = isfinite = lambda *arguments, **options: Numbers()
bfloat16 = int32 = int64 = None
backends.cudnn = types.SimpleNamespace(version=lambda: 91900)
ops = types.SimpleNamespace(megarlx=types.SimpleNamespace(sample={sample}))

cuda = types.SimpleNamespace(
    is_available=lambda: {available!r},
    get_arch_list=lambda: {architectures!r},
    init=init,
    nccl=types.SimpleNamespace(version=lambda: (2, 28, 9)),
)
from torch import distributed
"""
FAKE_DISTRIBUTED = """
is_available = is_gloo_available = lambda: True
is_mpi_available = lambda: False
is_nccl_available = lambda: {nccl!r}
HashStore = object

def init_process_group(*arguments, **options):
    {gloo}

def destroy_process_group():
    pass
"""
NVIDIA_SMI = """\
case "$*" in
  *query-gpu*) echo "NVIDIA H100 80GB HBM3, 9.0, {driver}" ;;
  *) echo "| NVIDIA-SMI {driver}   Driver Version: {driver}   CUDA Version: {cuda} |" ;;
esac"""
BUILD = {
    "torch": "2.11.0+cpu",
    "cuda": None,
    "cuda_architectures": None,
    "instruction_sets": ["default", "avx2"],
}
UNDEFINED = "undefined symbol: _ZN3c105ErrorC2ENS_14SourceLocationE"


class Machine:
    """A made-up machine: packages, programs and a build of megarlx that the doctor will find."""

    def __init__(self, root: Path) -> None:
        self.root, self.packages, self.programs = root, root / "packages", root / "bin"
        self.programs.mkdir(parents=True)
        package = self.packages / "megarlx"
        shutil.copytree(
            REPOSITORY / "megarlx",
            package,
            ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__"),
        )
        (package / "_C.py").write_text(
            "def load_cpu_kernels(path):\n    return 'AVX2'\n"
            "def own_products():\n    return False\n"
        )
        for name in ("_cpu_default", "_cpu_avx2", "_index"):
            (package / f"{name}.py").touch()
        for needed in NEEDED:
            self.package(needed.module, "__version__ = '99.0'", "99.0")
        for optional in OPTIONAL:
            top = optional.module.split(".")[0]
            self.package(top, f"raise ModuleNotFoundError(name={top!r})")
        self.torch()
        self.build()

    def package(self, name: str, source: str, version: str | None = None, own: str = "") -> None:
        path = self.packages.joinpath(*name.split("."), "__init__.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        if version is not None:
            own = own or name
            info = self.packages / f"{own.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Name: {own}\nVersion: {version}\n")

    def torch(
        self,
        version: str = "2.11.0+cpu",
        cuda: str | None = None,
        available: bool = False,
        architectures: tuple[str, ...] = ("sm_80", "sm_90"),
        gloo: str = "pass",
        sample: str = "lambda *arguments: [Numbers()]",
    ) -> None:
        self.package(
            "torch",
            FAKE_TORCH.format(
                version=version,
                cuda=cuda,
                available=available,
                architectures=list(architectures),
                sample=sample,
            ),
        )
        (self.packages / "torch" / "distributed.py").write_text(
            FAKE_DISTRIBUTED.format(nccl=cuda is not None, gloo=gloo)
        )

    def cuda_torch(self, **changes: object) -> None:
        options = {"version": "2.11.0+cu130", "cuda": "13.0", "available": True}
        self.torch(**(options | changes))  # type: ignore[arg-type]

    def build(self, **changes: object) -> None:
        build = json.dumps(BUILD | changes)
        (self.packages / "megarlx" / "_build.json").write_text(build)

    def cuda_build(self, architectures: str) -> None:
        self.build(torch="2.11.0+cu130", cuda="13.0", cuda_architectures=architectures)

    def program(self, name: str, script: str) -> None:
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def gpu(self, driver: str = "580.65.06", cuda: str = "13.0") -> None:
        self.program("nvidia-smi", NVIDIA_SMI.format(driver=driver, cuda=cuda))
        self.program("nvcc", f"echo 'Cuda compilation tools, release {cuda}, V{cuda}.48'")
        header = self.root / "include" / "cuda_runtime.h"
        header.parent.mkdir(exist_ok=True)
        header.touch()

    def doctor(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA", "CXX", "LD_"))}
        path = f"{self.programs}:/usr/bin:/bin"
        return subprocess.run(
            [sys.executable, "-m", "megarlx", "doctor", *arguments],
            env={**kept, "PYTHONPATH": str(self.packages), "PATH": path, **environment},
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def findings(self, *arguments: str, **environment: str) -> dict[str, Finding]:
        ended = self.doctor("--json", *arguments, **environment)
        data = json.loads(ended.stdout)
        found = {f["part"]: Finding(**f) for f in data["findings"]}
        ill = [f.part for f in found.values() if not f.well]
        assert data["ok"] is (not ill)
        assert ended.returncode == (1 if ill else 0), ended.stderr
        for part in ill:
            assert found[part].mend, f"{part} has no command that mends it"
        return found


def ill(findings: dict[str, Finding]) -> dict[str, str]:
    return {f.part: f.state for f in findings.values() if not f.well}
