"""torch.compile as a baseline: it compiles, or there is no row."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from gpu.clock import Call
from gpu.pieces import Context, note


class NotCompiled(RuntimeError):
    pass


def compiled(context: Context, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled whole. Where it would run eagerly instead, it raises.

    A compiler takes the question away when it traces; only Python itself still asks it. At tiny
    sizes the graph is traced and not compiled further, which takes seconds a graph.
    """

    def asked(*arguments: Any, **options: Any) -> Any:
        if not torch.compiler.is_compiling():
            raise NotCompiled("torch.compile ran the function eagerly")
        return function(*arguments, **options)

    # A pool of compilers costs more seconds than the few kernels of a baseline.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    backend = context.either("inductor", "eager")
    return torch.compile(asked, fullgraph=True, dynamic=False, backend=backend)


def with_compiled(functions: dict[str, Call], name: str, call: Call) -> None:
    """Adds the baseline if it runs; if not, says why there is no row of it."""
    try:
        call(0)
    except Exception as error:  # noqa: BLE001 - told in place of the row
        note(f"no row of {name}: {type(error).__name__}: {error}"[:300])
        return
    functions[name] = call
