"""The CUDA toolkit is found behind a wrapper, and an error names all that was looked at."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megarlx.doctor.cuda_home import find_cuda_home

ROOT = Path(__file__).resolve().parents[2]


def toolkit(root: Path) -> Path:
    """A made-up toolkit whose nvcc answers as the real one does when it is asked for a dry run."""
    (root / "include").mkdir(parents=True)
    (root / "include" / "cuda_runtime.h").touch()
    script(root / "bin" / "nvcc", f"echo '#$ TOP={root}/bin/..' >&2")
    return root


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def found(tmp_path: Path, *folders: Path, **environment: str) -> Path | None:
    path = os.pathsep.join(map(str, folders))
    return find_cuda_home({"PATH": path, **environment}, usual=tmp_path / "usual").path


def test_nvcc_beside_the_headers_is_at_home(tmp_path: Path) -> None:
    home = toolkit(tmp_path / "cuda")
    assert found(tmp_path, home / "bin") == home


def test_a_wrapper_is_followed_to_the_toolkit_that_it_calls(tmp_path: Path) -> None:
    home = toolkit(tmp_path / "cuda-13.0")
    wrapper = script(tmp_path / "local" / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"')
    assert found(tmp_path, wrapper.parent) == home


def test_a_link_is_followed_to_the_toolkit_that_it_points_to(tmp_path: Path) -> None:
    home = toolkit(tmp_path / "cuda-13.0")
    script(home / "bin" / "nvcc", "exit 1")  # says nothing of itself
    link = tmp_path / "local" / "bin" / "nvcc"
    link.parent.mkdir(parents=True)
    link.symlink_to(home / "bin" / "nvcc")
    assert found(tmp_path, link.parent) == home


def test_the_usual_place_is_taken_where_a_wrapper_tells_nothing(tmp_path: Path) -> None:
    home = toolkit(tmp_path / "usual")
    wrapper = script(tmp_path / "local" / "bin" / "nvcc", "exit 1")
    assert found(tmp_path, wrapper.parent) == home
    assert found(tmp_path) == home


def test_a_given_home_holds_alone(tmp_path: Path) -> None:
    home, other = toolkit(tmp_path / "given"), toolkit(tmp_path / "other")
    assert found(tmp_path, other / "bin", CUDA_HOME=str(home)) == home
    assert found(tmp_path, other / "bin", CUDA_PATH=str(home)) == home
    assert found(tmp_path, other / "bin", CUDA_HOME=str(tmp_path / "nowhere")) is None


def test_all_that_was_looked_at_is_told_once(tmp_path: Path) -> None:
    wrapper = script(tmp_path / "local" / "bin" / "nvcc", "echo '#$ TOP=/nowhere/bin/..' >&2")
    home = find_cuda_home({"PATH": str(wrapper.parent)}, usual=tmp_path / "usual")
    assert home.path is None
    assert home.nvcc_on_path == str(wrapper)
    assert home.looked == (
        f"{tmp_path}/local (of {wrapper}) has no include/cuda_runtime.h",
        f"/nowhere (as {wrapper} --dryrun says) has no bin/nvcc and no include/cuda_runtime.h",
        f"{tmp_path}/usual (the usual place) has no bin/nvcc and no include/cuda_runtime.h",
    )


@pytest.mark.parametrize("asked", ["1", ""])
def test_a_build_for_cuda_without_a_toolkit_says_where_it_looked(
    tmp_path: Path, asked: str
) -> None:
    """With a CUDA torch; its version is all that is asked of it."""
    script(tmp_path / "bin" / "nvcc", "exit 1")
    (tmp_path / "torch.py").write_text(
        "import types\n__version__ = '2.11.0+cu130'\nversion = types.SimpleNamespace(cuda='13.0')\n"
    )
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=ROOT,
        env={
            **{k: v for k, v in os.environ.items() if k != "CUDA_PATH"},
            "PYTHONPATH": str(tmp_path),
            "PATH": path,
            "MEGARLX_CUDA": asked,
            "CUDA_HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    said = rf"no CUDA toolkit: {re.escape(str(tmp_path))} \(CUDA_HOME\) has no include/cuda_runtime"
    assert re.search(said, done.stderr), done.stderr
