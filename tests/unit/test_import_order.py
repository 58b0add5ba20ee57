"""Imports inside megarlx go one way, and optional packages stay where they belong."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from import_order import LAYERS, PACKAGE, imports_of_source

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# package -> the only files that may import it
CONFINED = {
    "transformer_engine": {
        *("model/layers_te.py", "model/attention_te.py", "model/machine.py", "doctor/child.py")
    },
    "flash_attn": {"model/attention_flash.py", "doctor/child.py"},
    "mpi4py": {"comm/launch.py"},
    "megarlx._C": {"ops/native.py"},
}


def imports_of(path: Path) -> list[str]:
    return imports_of_source(path.read_text(), path)


FILES = sorted(PACKAGE.rglob("*.py"))


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_never_step_backwards(path: Path) -> None:
    unit = unit_of(path)
    if unit == "__init__":
        return
    assert unit in LEVEL, f"megarlx/{unit} has no place in the import order: add it to LAYERS"
    for name in imports_of(path):
        if not name.startswith("megarlx.") or name.startswith("megarlx._"):
            continue
        target = name.split(".")[1]
        if target in LEVEL:
            assert LEVEL[target] <= LEVEL[unit], f"{unit} imports {name}, which stands above it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_study_is_a_user_like_any_other(path: Path) -> None:
    """plug.py and cli.py name parts of it in strings."""
    if unit_of(path) != "study":
        found = [name for name in imports_of(path) if f"{name}.".startswith("megarlx.study.")]
        assert not found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_optional_packages_are_imported_only_where_they_belong(path: Path) -> None:
    here = str(path.relative_to(PACKAGE))
    for name in imports_of(path):
        for package, allowed in CONFINED.items():
            if name == package or name.startswith(package + "."):
                assert here in allowed, f"{here} imports {name}; only {sorted(allowed)} may"


def test_the_walk_sees_imports_of_every_kind(tmp_path: Path) -> None:
    path = PACKAGE / "comm" / "pretended.py"  # never written: only its place counts
    source = tmp_path / "pretended.py"
    source.write_text(
        "import megarlx.training.trainer\n"
        "def f():\n    from megarlx.model import transformer\n"
        "    import importlib\n    importlib.import_module('megarlx.cli')\n"
    )
    tree_names = {
        name for name in imports_of_source(source.read_text(), path) if name.startswith("megarlx")
    }
    assert {"megarlx.training.trainer", "megarlx.model.transformer", "megarlx.cli"} <= tree_names


def test_megarlx_imports_neither_torch_nor_the_study() -> None:
    code = (
        "import sys, megarlx; assert megarlx.load_config; "
        "print([m for m in sys.modules if m == 'torch' or m.startswith('megarlx.study')])"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.strip() == "[]"
