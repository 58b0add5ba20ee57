"""tools/inspect_checkpoint.py shows, checks and compares."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hf_cases import convert, published, save

TOOL = Path(__file__).resolve().parents[3] / "tools" / "inspect_checkpoint.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("inspect_checkpoint", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    there = save(published("qwen3"), tmp_path / "hf")
    convert(there, tmp_path / "run", iteration=20, tokens="5M", file_bytes=20_000)
    return there, tmp_path / "run"


def test_it_shows_what_is_inside(
    tool: ModuleType, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    there, run = folders
    assert tool.main([str(run)]) == 0
    shown = capsys.readouterr().out
    assert "iteration 20" in shown
    assert '"pretraining": 5000000' in shown
    assert "layers.2.attention.q_norm.weight" in shown
    assert "in 2 blocks" in shown
    assert f'"source": "{there}"' in shown
    assert tool.main([str(there)]) == 0
    shown = capsys.readouterr().out
    assert "Qwen3ForCausalLM" in shown
    assert "float32   [68, 52]" in shown


def test_damage_is_found_by_verify_alone(
    tool: ModuleType, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = folders
    assert tool.main([f"{run}@20", "--verify"]) == 0
    assert "have the digests of the manifest" in capsys.readouterr().out
    file = run / "checkpoints" / "iter_00000020" / "model-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert tool.main([str(run)]) == 0
    assert tool.main([str(run), "--verify"]) == 1
    assert "model-00001.safetensors is damaged" in capsys.readouterr().err


def test_differences_are_norms_of_each_tensor(
    tool: ModuleType,
    folders: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    there, run = folders
    assert tool.main(["--diff", str(there), str(run)]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert len(rows) == 36
    assert all(float(row.split()[3]) == 0 for row in rows)
    other = published("qwen3")
    weight = other.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[2, 3] += 3
        weight[50, 4] -= 4
    assert tool.main(["--diff", str(run), str(save(other, tmp_path / "other"))]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    changed = [row.split() for row in rows if float(row.split()[3])]
    assert [row[0] for row in changed] == ["layers.1.mlp.up.weight"]
    assert float(changed[0][3]) == pytest.approx(5, rel=1e-5)
    assert float(changed[0][2]) == pytest.approx(weight.double().norm().item(), rel=1e-5)


def test_what_it_cannot_do_is_said_in_a_line(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([str(tmp_path)]) == 1
    assert "holds no checkpoint" in capsys.readouterr().err
    assert tool.main([str(tmp_path), "--diff", "a", "b"]) == 2
    assert "give either PATH or --diff A B" in capsys.readouterr().err
