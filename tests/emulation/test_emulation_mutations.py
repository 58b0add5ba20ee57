"""Each __syncthreads of the CUDA kernels, taken out, is missed (cuda_emulation/mutations.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from cuda_emulation.build import KINDS, why_not  # noqa: E402
from cuda_emulation.mutations import SUPERFLUOUS, Mutation, mutations, seen_by  # noqa: E402


@pytest.mark.slow
@pytest.mark.parametrize("mutation", list(mutations()), ids=lambda m: f"{m.file}-{m.number}")
def test_a_barrier_that_is_taken_out_is_missed(mutation: Mutation) -> None:
    if (reason := why_not(KINDS["thread"])) is not None:
        pytest.skip(f"the thread sanitizer does not start: {reason}")
    superfluous = (mutation.file, mutation.number) in SUPERFLUOUS
    assert (seen_by(mutation) == "") == superfluous
