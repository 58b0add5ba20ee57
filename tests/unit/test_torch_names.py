"""Only public names of torch are used, and only two of its classes derived from.

Private names and overridable internals change between torch's releases without a word: an override
of PipelineStage once failed on one of the two releases that setup.py installs.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    ROOT / "setup.py",
    *sorted(
        path for folder in ("megarlx", "tools", "benchmarks", "tests")
        for path in (ROOT / folder).rglob("*.py")
    ),
]  # fmt: skip

# Private modules and names that have no public equal: where, what begins so, and why.
FAKE = "torch.testing._internal.distributed.fake_pg"
DISPATCH = "torch.utils._python_dispatch"
ALLOWED_NAMES = {
    ("megarlx/comm/launch.py", FAKE): "the only process group without processes",
    ("benchmarks/gpu/clock.py", "torch.cuda._sleep"): "the only call that makes a card wait",
    ("tests/unit/generation/test_ahead.py", DISPATCH): "the only way to see operators",
    ("tests/unit/generation/test_fused_decode.py", DISPATCH): "the only way to see operators",
    ("tests/unit/host_waits/watch.py", DISPATCH): "the only way to see operators",
    ("tests/unit/model/test_attention_backends.py", DISPATCH): "the only way to see operators",
    ("tests/unit/test_captured.py", DISPATCH): "the only way to see operators",
    ("tests/unit/ops/test_distill_loss.py", DISPATCH): "the only way to see operators",
    ("tests/unit/host_waits/watch.py", "torch._subclasses.fake_tensor"): "tensors without a card",
    ("tests/unit/host_waits/watch.py", "torch._C"): "operators called while they are watched",
    ("tests/unit/host_waits/steps.py", "torch._subclasses.fake_tensor"): "its own exception",
}
DCP = "torch.distributed.checkpoint"
ALLOWED_BASES = {
    ("setup.py", "torch.utils.cpp_extension.BuildExtension"): "setuptools asks for a class",
    ("megarlx/checkpoint/storage.py", f"{DCP}.storage.StorageWriter"): "documented to be derived",
    ("megarlx/checkpoint/storage.py", f"{DCP}.storage.StorageReader"): "documented to be derived",
    ("megarlx/checkpoint/planner.py", f"{DCP}.default_planner.DefaultSavePlanner"): "likewise",
    ("megarlx/checkpoint/planner.py", f"{DCP}.default_planner.DefaultLoadPlanner"): "likewise",
    ("tests/unit/generation/test_ahead.py", f"{DISPATCH}.TorchDispatchMode"): "as above",
    ("tests/unit/generation/test_fused_decode.py", f"{DISPATCH}.TorchDispatchMode"): "as above",
    ("tests/unit/host_waits/watch.py", f"{DISPATCH}.TorchDispatchMode"): "as above",
    ("tests/unit/model/test_attention_backends.py", f"{DISPATCH}.TorchDispatchMode"): "as above",
    ("tests/unit/test_captured.py", f"{DISPATCH}.TorchDispatchMode"): "as above",
    ("tests/unit/ops/test_distill_loss.py", f"{DISPATCH}.TorchDispatchMode"): "as above",
    ("tests/unit/model/test_attention_backends.py", "torch.Tensor"): "one that says it is on CUDA",
    ("tests/unit/ops/test_loss_seam.py", "torch.overrides.TorchFunctionMode"): "documented",
}
DERIVED = {"torch.nn.Module", "torch.autograd.Function"}
# The project's own operators, some of which are private to it.
OURS = ("torch.ops.megarlx", "torch.ops.megarlx_emulated")


def imported(tree: ast.Module) -> dict[str, str]:
    """What each name at hand stands for, among those that come from torch."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    whole = alias.name if alias.asname else "torch"
                    names[alias.asname or "torch"] = whole
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def chain(node: ast.expr, names: dict[str, str]) -> str | None:
    """`F.linear` as torch.nn.functional.linear; None for what does not begin at torch."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in names:
        return None
    return ".".join([names[node.id], *reversed(parts)])


def used(tree: ast.Module) -> Iterator[str]:
    names = imported(tree)
    yield from names.values()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            yield from [module] if module else [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute) and (found := chain(node, names)):
            yield found


def is_private(name: str) -> bool:
    if not name.startswith("torch.") or name.startswith(OURS):
        return False
    return any(p.startswith("_") and not p.startswith("__") for p in name.split("."))


def bases(tree: ast.Module) -> Iterator[tuple[str, str]]:
    names = imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for base in node.bases:
                if found := chain(base, names):
                    yield node.name, found


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_no_private_name_of_torch_is_used():
    found = {
        (place(path), name)
        for path in SOURCES
        for name in used(ast.parse(path.read_text()))
        if is_private(name)
    }
    needed = {
        allowed for allowed in ALLOWED_NAMES
        if any(at == allowed[0] and name.startswith(allowed[1]) for at, name in found)
    }  # fmt: skip
    assert needed == set(ALLOWED_NAMES)
    assert not {
        (at, name) for at, name in found
        if not any(at == allowed and name.startswith(begin) for allowed, begin in ALLOWED_NAMES)
    }  # fmt: skip


def test_no_class_of_torch_is_derived_from_but_modules_and_functions():
    found = {
        (place(path), base)
        for path in SOURCES
        for _, base in bases(ast.parse(path.read_text()))
        if base not in DERIVED
    }
    assert found == set(ALLOWED_BASES)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch._C", ["torch._C"]),
        ("from torch.utils._x import y", ["torch.utils._x.y"]),
        ("import torch\ntorch.cuda._sleep(1)", ["torch.cuda._sleep"]),
        ("from torch import nn as n\nn.modules._x.y", ["torch.nn.modules._x.y"]),
        ("import torch\ntorch.__version__\ntorch.ops.megarlx._heads", []),
        ("import other\nother._x", []),
    ],
)  # fmt: skip
def test_the_walk_sees_private_names_in_imports_and_in_chains(source, names):
    assert {name for name in used(ast.parse(source)) if is_private(name)} >= set(names)
    assert bool(names) == any(is_private(name) for name in used(ast.parse(source)))


def test_the_walk_sees_bases_under_other_names():
    source = "from torch.utils import data as d\nclass A(d.Dataset): pass\nclass B(A): pass"
    assert list(bases(ast.parse(source))) == [("A", "torch.utils.data.Dataset")]
