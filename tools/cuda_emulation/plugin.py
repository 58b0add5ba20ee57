"""pytest -p cuda_emulation.plugin: tests of ops run on the emulated CUDA kernels.

Tests of tests/unit/ops run as they are, with the emulated kernels in place of the CPU's; a test or
a case of one that is marked `not_emulated(reason)` is left out. Tests of tests/gpu get the emulated
card from their fixture `card`. Each test pretends another card, always the same one.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from .build import ROOT
from .library import EmulatedKernels, PretendedCard, load

UNIT_TESTS = ROOT / "tests" / "unit" / "ops"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("not_emulated")
    if marker is not None:
        pytest.skip(f"not emulated: {marker.args[0]}")


@pytest.fixture(autouse=True)
def pretended_card(request: pytest.FixtureRequest) -> Iterator[None]:
    card = PretendedCard.drawn_from(request.node.nodeid)
    request.node.user_properties.append(("pretended card", str(card)))
    library = load()
    library.pretend(card)
    if request.node.path.is_relative_to(UNIT_TESTS):
        with EmulatedKernels(library):
            yield
    else:
        yield


@pytest.fixture
def emulated_kernels() -> EmulatedKernels:
    return EmulatedKernels(load())


def pytest_report_header() -> str:
    return "megarlx's CUDA kernels are emulated on this CPU"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        report.sections += [(name, str(value)) for name, value in item.user_properties]
    return report
