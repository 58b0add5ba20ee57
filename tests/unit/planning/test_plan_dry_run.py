"""One rank without data: what it sends is the formula's, and it costs seconds at any size."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from planned_jobs import gemma3, llama3, olmo2, qwen3, seventy_billion

from megarlx.config.model import ModelConfig
from megarlx.planning.dry_run import build, dry_run, fake_world
from megarlx.planning.job import Job
from megarlx.planning.report import compare, differing


def short(model: ModelConfig) -> ModelConfig:
    return model.model_copy(update={"layers": 4})


LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tp": 2},
    "tensor and sequence, layers again": {
        "tp": 2,
        "sequence_parallel": True,
        "recompute": "full",
    },
    "data, two objectives": {"dp": 4, "objectives": 2},
    "all three": {"tp": 2, "pp": 2, "dp": 2},
    "interleaved": {"pp": 2, "schedule": "interleaved", "virtual_stages": 2},
    "V": {"pp": 2, "schedule": "zbv", "virtual_stages": 2, "tp": 2, "sequence_parallel": True},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    "model",
    [short(olmo2()), short(qwen3()), short(gemma3())],
    ids=["olmo2", "qwen3 tied", "gemma3"],
)
def test_a_walked_step_sends_what_the_formula_says(
    model: ModelConfig, layout: dict[str, Any]
) -> None:
    job = Job(model, 4, 1, 32, bucket_elements=50_000, **layout)
    job.check()
    for rank in (0, job.gpus - 1):
        rows = compare(dry_run(job, rank), job)
        assert differing(rows) == []
        assert sum(counted for *_, counted, _ in rows) > 0


def test_a_rank_of_70b_on_1024_gpus_is_built_and_walked_in_under_a_minute() -> None:
    job = Job(seventy_billion(), 128, 1, 4096, tp=8, pp=8, dp=16, sequence_parallel=True)
    job.check(1024)
    start = time.perf_counter()
    run = dry_run(job, 1023)
    assert time.perf_counter() - start < 60
    assert run.place == {"pp": 7, "dp": 15, "tp": 7}
    assert run.stages == ((70, 80),)
    assert differing(compare(run, job)) == []
    assert run.sent()["dp", "reduce_scatter"] > 4e9


def test_the_parameters_of_all_ranks_are_the_models() -> None:
    """Vectors that tensor ranks copy, and padded rows of the vocabulary, are counted by hand."""
    job = Job(llama3(), 8, 1, 32, tp=2, pp=2)
    held = sum(dry_run(job, rank).parameters for rank in range(4))
    hidden, layers = 192, 4
    copies = (2 * layers + 1) * hidden
    padding = 2 * (2048 - 2000) * hidden  # embedding and head, to a multiple of 2 x 128
    assert held == llama3().parameters() + copies + padding


def test_a_dry_run_leaves_no_process_group_and_refuses_to_share_one() -> None:
    with fake_world(3, 8):
        assert dist.get_world_size() == 8
        with pytest.raises(RuntimeError, match="a process of its own"), fake_world(0, 2):
            pass
    assert not dist.is_initialized()


@pytest.mark.parametrize("rank", [-1, 8])
def test_a_rank_outside_the_job_is_refused(rank: int) -> None:
    with (
        pytest.raises(ValueError, match=f"rank is {rank}; allowed are 0 to 7"),
        fake_world(rank, 8),
    ):
        pass


def test_nothing_of_a_dry_run_holds_data() -> None:
    job = Job(olmo2(), 4, 1, 32, tp=2)
    with fake_world(0, 2):
        model = build(job, torch.device("meta"))
        assert model.data_parallel.weights.is_meta
        assert all(p.is_meta for stage in model.stages for p in stage.parameters())
