"""The bytes counted in a training step are the bytes of the formula, on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from grid import BUCKET, LENGTH, SEQUENCES, Case, model, train

from megarlx.comm.groups import Layout
from megarlx.parallel.pipeline_plan import PipelinePlan
from megarlx.planning.communication import StepShape, bytes_per_step

CASES = [
    Case("llama3", tp=2, precision="fp32"),
    Case("llama3", tp=2, sequence_parallel=True, precision="fp32"),
    Case("olmo2", tp=2, precision="fp32"),  # QK-norm over the ranks
    Case("olmo2", tp=4, sequence_parallel=True, recompute="selective", precision="fp32"),
    Case("olmo2", tp=2, recompute="full", precision="fp32"),
    Case("llama3", tp=2, sequence_parallel=True, recompute="full", precision="fp32"),
    Case("qwen3", tp=4, precision="fp32"),  # copied key heads
    Case("llama3", dp=2, precision="fp32"),
    Case("llama3", dp=4),  # fp64
    Case("llama3", pp=2, precision="fp32"),
    Case("qwen2", pp=2, tied=True, precision="fp32"),
    Case("llama3", pp=2, schedule="zbv", virtual_stages=2, precision="fp32"),
    Case("qwen2", 2, 2, 2, tied=True, sequence_parallel=True, precision="fp32"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_rank_sends_the_bytes_of_the_formula(run: Callable[..., Any], case: Case) -> None:
    config = model(case.family, case.tied)
    layout = Layout(pp=case.pp, dp=case.dp, tp=case.tp)
    plan = PipelinePlan.make(
        config.layers, case.pp, case.schedule, case.virtual_stages, case.layers_per_stage
    )
    size = 8 if case.precision == "fp64" else 4
    step = StepShape(
        tokens_per_microbatch=SEQUENCES // case.dp // case.microbatches * LENGTH,
        microbatches=case.microbatches,
        sequence_parallel=case.sequence_parallel,
        recompute=case.recompute,
        element_bytes=size,
        wide_bytes=size,
        bucket_elements=BUCKET,
    )
    for rank, result in enumerate(run(case.world_size, train, case)):
        formula = bytes_per_step(config, layout, plan, step, rank)
        counted = {key: sent for key, sent in result["sent"].items() if sent}
        assert counted == {key: sent for key, sent in formula.items() if sent}, rank
