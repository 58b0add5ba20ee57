"""The marker of what is left out where the CUDA kernels are emulated."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "not_emulated(reason): left out where the CUDA kernels are emulated on a CPU",
    )
