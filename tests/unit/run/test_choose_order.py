"""Transformer Engine is imported before anything on the GPU is computed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from chosen_configs import config

from megarlx.comm import launch
from megarlx.model import machine as machines
from megarlx.run import assemble as assembling


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up Transformer Engine on a made-up card; returns its module's file."""
    module = tmp_path / "packages" / "transformer_engine" / "pytorch.py"
    module.parent.mkdir(parents=True)
    (module.parent / "__init__.py").write_text("__version__ = '2.12.0'\n")
    module.write_text("")
    monkeypatch.syspath_prepend(module.parents[1])
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    monkeypatch.setattr(machines, "flash_version", lambda: 2)
    return module


def test_a_card_is_told_with_the_packages_that_import(engine: Path) -> None:
    found = machines.this_machine(torch.device("cuda"))
    assert (found.gpu, found.capability) == ("NVIDIA H100", (9, 0))
    assert found.transformer_engine.version == "2.12.0"
    assert found.flash_attention.version == "2"


@pytest.mark.parametrize("kind", ["ImportError", "OSError", "RuntimeError", "AssertionError"])
def test_a_package_that_does_not_load_is_told_by_its_first_line(engine: Path, kind: str) -> None:
    engine.write_text(f"raise {kind}('libcudnn_cnn.so.9: undefined symbol: x\\nand more')\n")
    found = machines.this_machine(torch.device("cuda")).transformer_engine
    assert found.error == "libcudnn_cnn.so.9: undefined symbol: x"
    assert not found.version


def test_a_cpu_looks_for_no_package(engine: Path) -> None:
    engine.write_text("raise AssertionError('imported')\n")
    assert machines.this_machine(torch.device("cpu")).gpu == ""


def test_a_run_imports_it_before_it_makes_groups_or_a_model(
    engine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where it chooses, and where it was told."""

    class Reached(Exception):
        pass

    def reached(*_: object, **__: object) -> None:
        raise Reached("transformer_engine.pytorch" in sys.modules)

    monkeypatch.setattr(assembling.Mesh, "build", reached)
    monkeypatch.setattr(assembling, "build_model", reached)
    monkeypatch.setattr(assembling, "use_tf32", reached)
    for layers in ("auto", "te", "torch"):
        for name in ("transformer_engine", "transformer_engine.pytorch"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        with pytest.raises(Reached, match="True"):
            assembling.assemble(
                config(layers=layers), tmp_path / "run", launch.Launch(), torch.device("cuda")
            )


@pytest.mark.parametrize("given", [True, False])
def test_tf32_is_what_the_key_says_on_a_gpu_and_untouched_on_a_cpu(given: bool) -> None:
    switch = torch.backends.cuda.matmul
    before = switch.allow_tf32
    try:
        assembling.use_tf32(config(tf32=given), torch.device("cuda"))
        assert switch.allow_tf32 is given
        assembling.use_tf32(config(tf32=not given), torch.device("cpu"))
        assert switch.allow_tf32 is given
    finally:
        switch.allow_tf32 = before
