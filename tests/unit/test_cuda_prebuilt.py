"""tools/cuda_prebuilt.py: what it refuses, and the toolkit that it finds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import cuda_prebuilt

ROOT = Path(__file__).resolve().parents[2]


def test_the_torch_is_the_one_that_the_cuda_extra_pins() -> None:
    pins = re.findall(r'"torch==([\d.]+)", "transformer-engine', (ROOT / "setup.py").read_text())
    assert pins == [cuda_prebuilt.TORCH]


def test_another_python_is_refused_with_the_command_that_brings_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.11.7")
    (problem,) = cuda_prebuilt.missing()
    assert "needed is CPython 3.12: python3.12 -m venv" in problem


def test_what_is_missing_is_named_with_the_command_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.12.3")
    monkeypatch.setattr(cuda_prebuilt.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cuda_prebuilt.shutil, "which", lambda name: None)
    found = cuda_prebuilt.missing()
    assert [problem.split()[0] for problem in found] == [
        *("torch", "setuptools", "pybind11", "ninja", "c++", "strip"),
    ]
    assert found[0] == f"torch is missing: python -m pip install torch=={cuda_prebuilt.TORCH}"


@pytest.mark.parametrize(
    ("version", "cuda", "message"),
    [
        ("2.13.0", "13.0", "torch is 2.13.0; needed is 2.11.0"),
        ("2.11.0+cpu", None, "is a build for CPUs; needed is one for CUDA"),
        ("2.11.0+cu130", "13.0", "there is no nvcc with include/cuda_runtime.h"),
    ],
)
def test_a_torch_or_compiler_that_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: str, cuda: str | None, message: str
) -> None:
    monkeypatch.setattr("torch.__version__", version)
    monkeypatch.setattr(cuda_prebuilt, "cuda_of_torch", lambda: cuda)
    monkeypatch.setattr(cuda_prebuilt, "toolkits", list)
    (problem,) = cuda_prebuilt.missing_beside_torch()
    assert message in problem
    assert "pip install" in problem


def toolkit(folder: Path, release: str, headers: bool = True) -> Path:
    """A folder with an nvcc that says its release."""
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    nvcc.chmod(0o755)
    if headers:
        (folder / "include").mkdir()
        (folder / "include" / "cuda_runtime.h").touch()
    return folder


def test_a_compiler_of_another_release_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = toolkit(tmp_path / "old", "12.8")
    monkeypatch.setattr("torch.__version__", "2.11.0+cu130")
    monkeypatch.setattr(cuda_prebuilt, "cuda_of_torch", lambda: "13.0")
    monkeypatch.setattr(cuda_prebuilt, "toolkits", lambda: [old])
    (problem,) = cuda_prebuilt.missing_beside_torch()
    assert "12.8" in problem
    assert "needed is release 13" in problem
    monkeypatch.setattr(cuda_prebuilt, "toolkits", lambda: [old, toolkit(tmp_path / "new", "13.0")])
    assert cuda_prebuilt.missing_beside_torch() == []


def test_an_nvcc_without_headers_is_not_a_toolkit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = toolkit(tmp_path / "whole", "13.0")
    script = toolkit(tmp_path / "script", "13.0", headers=False)
    monkeypatch.setenv("PATH", str(script / "bin"))
    monkeypatch.setenv("CUDA_HOME", str(whole))
    found = cuda_prebuilt.toolkits()
    assert found[0] == whole
    assert script not in found


def test_a_toolkit_of_packages_gets_the_runtime_to_link_against(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    packages = toolkit(tmp_path / "nvidia" / "cu13", "13.0")
    (packages / "lib").mkdir()
    (packages / "lib" / "libcudart.so.13").write_text("the runtime")
    monkeypatch.setattr(cuda_prebuilt, "site", lambda: tmp_path)
    home = cuda_prebuilt.cuda_home(tmp_path / "home", packages)
    assert (home / "lib64" / "libcudart.so").read_text() == "the runtime"
    assert cuda_prebuilt.release_of(home) == "13.0"
    (packages / "lib64").mkdir()
    (packages / "lib64" / "libcudart.so").touch()
    assert cuda_prebuilt.cuda_home(tmp_path / "other", packages) == packages


def test_make_says_which_python_is_missing() -> None:
    done = subprocess.run(
        ["make", "cuda-prebuilt", "PREBUILT_PYTHON=no-such-python"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "no-such-python does not run. Install CPython 3.12" in done.stdout
