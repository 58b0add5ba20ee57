"""What loading the compiled library does to the process."""

from __future__ import annotations

import ctypes
import os
import resource

import pytest
import torch

from megarlx.ops import native

GLIBC = hasattr(ctypes.CDLL(None), "mallopt") and "MALLOC_TRIM_THRESHOLD_" not in os.environ


@pytest.mark.skipif(not GLIBC, reason="another allocator, or one that was set from outside")
def test_memory_that_a_step_frees_is_there_for_the_next_without_page_faults() -> None:
    native.load()
    megabytes, blocks = 12, 5
    page_count = blocks * (megabytes << 20) // resource.getpagesize()

    def faults_of_a_step() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        held = [torch.ones(megabytes << 18) for _ in range(blocks)]
        assert all(float(one[-1]) == 1.0 for one in held)
        del held
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert min(faults_of_a_step() for _ in range(6)) < page_count // 10
