"""Runs code on a CUDA device that is not there, and notes where the host would wait for it.

Tensors on the device are fake: they have shapes and no numbers. Tensors of the host are real, so
that what the host knows (lengths, offsets, tokens) is what it would be.

`load_device()` has to come before torch is imported: in a process of its own.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[2] / "megarlx"


def load_device(folder: Path) -> None:
    """Compiles the device that does nothing, and puts it where torch looks for one."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    torch = Path(spec.submodule_search_locations[0])
    library = folder / "fake_cuda.so"
    subprocess.run(
        [
            *(os.environ.get("CXX", "c++").split()[0], "-std=c++20", "-O0", "-shared", "-fPIC"),
            *(f"-I{torch / 'include'}", str(HERE / "fake_cuda.cpp")),
            *(f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", "-o", str(library)),
        ],
        check=True,
    )
    ctypes.CDLL(str(torch / "lib" / "libtorch_cpu.so"), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))


class Watched:
    """Operators that ran on the device, and places at which the host waited for it."""

    def __init__(self) -> None:
        self.operators: Counter[str] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()  # (place, what)

    def forget(self) -> None:
        """What came before the step that is looked at."""
        self.operators.clear()
        self.waits.clear()


@contextmanager
def watched() -> Iterator[Watched]:
    import torch
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    found = Watched()
    aten = torch.ops.aten
    reads = {aten._local_scalar_dense.default, aten.item.default}
    looks = {  # their output's size, or what they return, is known to the device alone
        *(aten.nonzero.default, aten.masked_select.default, aten.equal.default),
        *(aten.repeat_interleave.Tensor, aten._unique2.default, aten.unique_dim.default),
    }
    indexed = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
    free = {torch.ops.prim.device.default, aten.empty.memory_format, aten.empty_like.default}
    moves = {aten._to_copy.default, aten.copy_.default}

    def on_device(value: Any) -> bool:
        return isinstance(value, FakeTensor) and value.device.type == "cuda"

    def moved(func: Any, args: Any, kwargs: Any) -> tuple[bool, bool]:
        """Whether it comes from the device, and whether it goes there."""
        if func is aten.copy_.default:
            return on_device(args[1]), on_device(args[0])
        target = kwargs.get("device")
        here = args[0].device if target is None else torch.device(target)
        return on_device(args[0]), here.type == "cuda"

    def wait_of(func: Any, args: Any, kwargs: Any) -> str | None:
        name = str(func)
        if func in reads:
            return name if on_device(args[0]) else None
        if func in moves:
            source, target = moved(func, args, kwargs)
            late = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            if source and not target:  # into memory that is there one may copy and look later
                return None if func is aten.copy_.default and late else "copy to the host"
            return "copy to the device that is waited for" if target > source and not late else None
        if not any(map(on_device, leaves_of((args, kwargs)))):
            return None
        if func in looks and not (
            func is aten.repeat_interleave.Tensor and kwargs.get("output_size")
        ):
            return name
        if func in indexed and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        ):
            return f"{name} by a mask"
        if name.startswith("megarlx.") and "linear_token_loss" in name:
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
            if given.get("mask") is not None and given["drop_masked"]:
                return f"{name} that drops masked rows"
        return None

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            # In inference mode these come whole; elsewhere autograd has taken them apart.
            if func.namespace == "aten":
                with self:
                    if (parts := func.decompose(*args, **kwargs)) is not NotImplemented:
                        return parts
            leaves = leaves_of((args, kwargs))
            device = kwargs.get("device")
            fake = any(isinstance(leaf, FakeTensor) for leaf in leaves)
            if not fake and (device is None or torch.device(device).type == "cpu"):
                with torch._C._DisableTorchDispatch():
                    return func(*args, **kwargs)
            if not func.is_view and func not in free:
                found.operators[str(func)] += 1
            if (wait := wait_of(func, args, kwargs)) is not None:
                found.waits[_place(), wait] += 1
                if func in reads:
                    return 1.0 if args[0].dtype.is_floating_point else 1
            if func in moves and moved(func, args, kwargs) == (True, False):
                return _numbers(func, args, kwargs)
            return func(*args, **kwargs)

    def _numbers(func: Any, args: Any, kwargs: Any) -> Tensor:
        """What a copy to the host brings: some numbers, so that the host can go on."""
        with torch._C._DisableTorchDispatch():
            if func is aten.copy_.default:
                return args[0].zero_()
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)

    with FakeTensorMode(allow_non_fake_inputs=True), Watch():
        yield found


def leaves_of(value: Any) -> list[Any]:
    """What lies in lists, tuples and dicts of arguments."""
    if isinstance(value, dict):
        value = list(value.values())
    return (
        [leaf for one in value for leaf in leaves_of(one)]
        if type(value) in (list, tuple)
        else [value]
    )


def _place() -> str:
    """The function of ours that asks."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            return f"{path.relative_to(PACKAGE)}: {frame.f_code.co_qualname}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"
