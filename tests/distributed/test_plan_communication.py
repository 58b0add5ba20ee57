"""What `megarlx plan` says is sent is what real processes send, and what a dry run counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from grid import BUCKET, LENGTH, Case, model, train

from megarlx.planning.dry_run import dry_run
from megarlx.planning.job import Job
from megarlx.planning.report import compare, differing

CASES = [
    Case("olmo2", tp=2, dp=2, sequence_parallel=True, recompute="selective", precision="fp32"),
    Case("qwen2", tp=2, pp=2, tied=True, precision="fp32"),
]


def job_of(case: Case) -> Job:
    return Job(
        model(case.family, case.tied),
        sequences_per_step=case.sequences,
        sequences_per_microbatch=case.sequences // case.dp // case.microbatches,
        sequence_length=LENGTH,
        tp=case.tp,
        pp=case.pp,
        dp=case.dp,
        sequence_parallel=case.sequence_parallel,
        recompute=case.recompute,
        precision=case.precision,
        on_gpu=False,
        bucket_elements=BUCKET,
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_counted_planned_and_walked_bytes_are_the_same(run: Callable[..., Any], case: Case) -> None:
    job = job_of(case)
    for rank, result in enumerate(run(case.world_size, train, case)):
        counted = {key: sent for key, sent in result["sent"].items() if sent}
        walked = dry_run(job, rank)
        assert walked.sent() == counted
        assert differing(compare(walked, job)) == []
