"""`megarlx demo` finds its configurations in any folder, and an installed package has them."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from setuptools.dist import Distribution

from megarlx.config import load_config
from megarlx.config.sweep import SweepConfig
from megarlx.study import demo

ROOT = Path(__file__).resolve().parents[3]


def files_of(sweep: SweepConfig) -> list[Path]:
    recipes = [recipe for one in sweep.excursions for recipe in one.recipes]
    return [Path(path) for path in (sweep.trunk, *recipes)]


@pytest.mark.parametrize("name", ["demo", "study"])
def test_everywhere_all_files_of_a_sweep_are_found(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    elsewhere = demo.shipped_sweep(name, ["jobs=1"])
    assert all(path.is_absolute() and path.is_file() for path in files_of(elsewhere))
    monkeypatch.chdir(ROOT)
    here = demo.shipped_sweep(name, ["jobs=1"])
    assert here == load_config(f"configs/{name}.toml", ["jobs=1"], SweepConfig)
    assert [path.resolve() for path in files_of(here)] == files_of(elsewhere)


def test_a_wheel_holds_all_that_the_sweeps_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # setup.py sets up when it is run: only its class is wanted.
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setattr("sys.argv", ["setup.py", "--version"])
    monkeypatch.setenv("MEGARLX_CUDA", "0")
    monkeypatch.chdir(ROOT)
    packages = runpy.run_path(str(ROOT / "setup.py"))["Packages"]
    about = {"name": "megarlx", "packages": ["megarlx.study"], "script_name": "setup.py"}
    command = packages(Distribution(about))
    command.build_lib = str(tmp_path)
    command.finalize_options()
    command.run()
    installed = tmp_path / "megarlx" / "study"
    assert (installed / "demo.py").is_file()
    monkeypatch.setattr(demo, "__file__", str(installed / "demo.py"))
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "study"):
        for path in files_of(demo.shipped_sweep(name)):
            assert path.is_relative_to(installed / "configs")
            assert (
                path.read_bytes()
                == (ROOT / "configs" / path.relative_to(installed / "configs")).read_bytes()
            )


def test_an_archive_of_sources_holds_all_that_its_build_reads(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "configs"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "megarlx").mkdir()
    (tmp_path / "megarlx" / "__init__.py").touch()
    words = [sys.executable, "setup.py", "--quiet", "sdist"]
    environment = os.environ | {"MEGARLX_CUDA": "0"}
    subprocess.run(words, cwd=tmp_path, env=environment, check=True, capture_output=True)
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as opened:
        held = {name.split("/", 1)[-1] for name in opened.getnames()}
    for folder in ("csrc", "configs"):
        for path in (ROOT / folder).rglob("*"):
            assert path.is_dir() or str(path.relative_to(ROOT)) in held
