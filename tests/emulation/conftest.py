"""Tests of the emulated CUDA kernels: `make cuda-emulate` runs them, with cuda_emulation.plugin."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def launches(request: pytest.FixtureRequest) -> Callable[[str], int]:
    """How often a kernel has been launched."""
    return request.getfixturevalue("emulated_kernels").library.launches


@pytest.fixture(autouse=True)
def needs_the_plugin(request: pytest.FixtureRequest) -> None:
    with_plugin = request.config.pluginmanager.has_plugin("cuda_emulation.plugin")
    if "emulated_kernels" in request.fixturenames and not with_plugin:
        pytest.skip("`make cuda-emulate` runs it")
