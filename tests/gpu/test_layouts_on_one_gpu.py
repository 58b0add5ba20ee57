"""Layouts whose ranks share one GPU: gloo collectives on CUDA tensors, pipeline through the host.

NCCL refuses two ranks on one device, so this proves the functions, not the transport.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "distributed"))
from grid import Case, assemble, model, train
from harness import Pool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def gpu_pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.mark.parametrize(
    "case",
    [
        Case("olmo2", tp=2, device="cuda"),
        Case("qwen3", tp=2, sequence_parallel=True, device="cuda"),
        Case("llama3", pp=2, device="cuda"),
        Case("llama3", pp=2, schedule="interleaved", virtual_stages=2, device="cuda"),
        Case("qwen2", pp=2, schedule="zero_bubble", tied=True, device="cuda"),
        Case("qwen2", tp=2, pp=2, dp=2, tied=True, device="cuda"),
    ],
    ids=str,
)
def test_a_layout_on_one_gpu_trains_the_cpu_model(gpu_pool: Pool, case: Case) -> None:
    expected = train(case.single)  # fp64 on the CPU
    found = gpu_pool.run(case.world_size, train, case, time_limit=180)
    config = model(case.family, case.tied)
    for what in ("gradient", "weights"):
        ours = assemble(config, [rank[what] for rank in found])
        theirs = assemble(config, [expected[what]])
        for name, tensor in theirs.items():
            error = np.linalg.norm(ours[name] - tensor) / max(np.linalg.norm(tensor), 1e-30)
            assert error <= 1e-9, (what, name, error)
