"""Chooses the implementation of the layers: plain torch, or Transformer Engine on CUDA."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

BACKENDS = ("torch", "te")


def layers(backend: str) -> Any:
    """The module with ColumnLinear, RowLinear, VocabEmbedding, RMSNorm, recompute, precision;
    Transformer Engine is imported only when asked for."""
    if backend not in BACKENDS:
        raise ValueError(f"model: backend is '{backend}'; allowed: {', '.join(BACKENDS)}")
    if backend == "te" and importlib.util.find_spec("transformer_engine") is None:
        raise ImportError(
            "model: backend 'te' needs the package transformer_engine, which is not installed; "
            "backend 'torch' runs everywhere"
        )
    return importlib.import_module(f"megarlx.model.layers_{backend}")
