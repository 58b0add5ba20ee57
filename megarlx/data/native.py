"""The compiled index functions, megarlx._index."""

from __future__ import annotations

import importlib
from typing import Any


def _load() -> Any:
    try:
        return importlib.import_module("megarlx._index")
    except ImportError as error:
        raise ImportError(
            f"megarlx's native code is not built ({error}). Run:\n"
            "  python setup.py build_ext --inplace"
        ) from error


index = _load()
