"""Planned memory against what torch's allocator gave, and against formulas written here."""

from __future__ import annotations

import pytest
import torch
from planned_jobs import cpu_job, gemma3, llama3, olmo2, seventy_billion

from megarlx.comm.groups import Mesh
from megarlx.generation.engine import Engine
from megarlx.model.transformer import Stage
from megarlx.parallel.pipeline_actions import computations, most_held
from megarlx.parallel.pipeline_plan import PipelinePlan, Schedule
from megarlx.planning.dry_run import build, fake_world, trainer_of
from megarlx.planning.job import Job
from megarlx.planning.measure import measure
from megarlx.planning.memory import (
    Rollouts,
    kv_cache_bytes,
    optimizer_bytes,
    rank_memory,
    worst_rank,
)

MEASURED = {
    "everything kept": (cpu_job(olmo2()), 0),
    "gradients by logits kept": (
        cpu_job(olmo2().model_copy(update={"vocab_size": 8000}), kept_gradients_mib=16),
        0,
    ),
    "layers computed again, two objectives": (
        cpu_job(llama3(), recompute="full", objectives=2, dp=2),
        1,
    ),
    "tensor and sequence parallel": (
        cpu_job(olmo2(), tp=2, sequence_parallel=True, recompute="selective"),
        1,
    ),
    "windows and four norms": (cpu_job(gemma3()), 0),
    "windows, layers computed again": (cpu_job(gemma3(), recompute="full", tp=2), 1),
    "first of two pipeline ranks": (
        cpu_job(llama3(), pp=2, sequences_per_step=16, sequence_length=64),
        0,
    ),
    "last of two ranks, weights later": (
        cpu_job(llama3(), pp=2, sequences_per_step=16, sequence_length=64, schedule="zero_bubble"),
        1,
    ),
    "weights later, layers computed again": (
        cpu_job(
            olmo2(), pp=2, sequences_per_step=16, schedule="zbv", virtual_stages=2, recompute="full"
        ),
        0,
    ),
}


@pytest.mark.parametrize(("job", "rank"), MEASURED.values(), ids=MEASURED)
def test_planned_peak_is_within_a_tenth_of_the_measured_one(job: Job, rank: int) -> None:
    planned, measured = rank_memory(job, rank), measure(job, rank)
    assert planned.peak == pytest.approx(measured.peak, rel=0.1)
    # What a step adds is checked by itself: weights and moments must not hide it.
    adds = planned.peak - planned.persistent
    assert adds == pytest.approx(measured.peak - measured.persistent, rel=0.1)
    assert adds > 0.1 * planned.persistent


@pytest.mark.parametrize(("precision", "element"), [("bf16", 2), ("fp32", 4)])
def test_a_gpu_has_a_chunk_of_logits_and_the_gradients_that_fit(
    precision: str, element: int
) -> None:
    """8,192 tokens of 50,304 ids, 4,096 a chunk."""
    model = olmo2().model_copy(update={"vocab_size": 50_304})
    job = Job(model, 4, 4, 2048, precision=precision, recompute="full")
    mib = 8192 * 50_304 * element // 2**20

    def workspace(tokens: int, kept: int) -> int:
        changed = job.changed(sequence_length=tokens // 4, kept_gradients_mib=kept)
        return rank_memory(changed, 0).workspace

    each = 10 * 4 + 2 * 128 * element  # of another token, beside its logits
    assert workspace(8192, 0) - workspace(4096, 0) == 4096 * each
    assert workspace(8192, mib) - workspace(8192, 0) == 4096 * 50_304 * element
    assert workspace(8192, mib - 1) == workspace(8192, 0)
    assert workspace(4096, mib) == workspace(4096, 0)  # one chunk is all


def test_selective_recomputation_keeps_neither_attention_nor_the_product_of_gate_and_up() -> None:
    whole, selective = cpu_job(llama3()), cpu_job(llama3(), recompute="selective")
    added = [found.peak - found.persistent for found in (measure(whole), measure(selective))]
    saved = [rank_memory(job, 0).activations for job in (whole, selective)]
    tokens, layers, inner = 4 * 128, 4, 512
    queries_and_keys, inverse = (6 + 2) * 32, 6
    by_hand = 4 * layers * tokens * (inner + queries_and_keys + inverse)
    assert saved[0] - saved[1] == by_hand
    # Less at the peak, by what one layer makes again at that moment.
    assert added[0] - added[1] == pytest.approx(by_hand, rel=0.25)


@pytest.mark.parametrize("objectives", [1, 2, 3])
@pytest.mark.parametrize(("precision", "dp"), [("bf16", 4), ("fp32", 2), ("fp64", 2), ("bf16", 1)])
def test_persistent_memory_is_that_of_the_tensors_the_optimizer_holds(
    objectives: int, precision: str, dp: int
) -> None:
    job = cpu_job(olmo2(), objectives=objectives, precision=precision, dp=dp, sequences_per_step=16)
    device = torch.device("meta")
    with fake_world(0, job.gpus):
        trainer = trainer_of(job, build(job, device), device)
    optimizer, parallel = trainer.optimizer, trainer.model.data_parallel
    held = {
        id(tensor): tensor
        for tensor in (
            parallel.weights,
            parallel.gradients,
            optimizer.master,
            optimizer.masters.out,
            *optimizer.gradients.values(),
            *(shard for shards in optimizer.kept.shards.values() for shard in shards.values()),
        )
        if tensor is not None
    }
    planned = rank_memory(job, 0)
    assert planned.persistent == sum(tensor.nbytes for tensor in held.values())


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_bytes_of_a_parameter_are_those_of_the_design(objectives: int) -> None:
    job = Job(olmo2(), 8, 1, 128, dp=4, objectives=objectives)
    memory = rank_memory(job, 0)
    numbers = memory.weights // 2
    # 2 a weight, 4 the gradient buffer, (4 + 12 n) / dp the shard; the bf16 shard of new weights
    # that is gathered from is 2 / dp more.
    assert memory.persistent == numbers * 6 + numbers // 4 * (4 + 12 * objectives + 2)
    assert optimizer_bytes(job, 400) == 100 * (4 + 12 * objectives + 2)


def test_a_layer_keeps_the_tensors_counted_by_hand() -> None:
    # OLMo2, one rank, fp32, T tokens: x, attention's result, x1, MLP's result: 4 h; fused
    # projection 3 h; rotated queries and keys 2 h; attended 1 h; gate, up, product 3 F;
    # log-sum-exp one a head; inverses of two norms and of QK-norm's two: 4.
    few = cpu_job(olmo2(), sequences_per_microbatch=2, sequences_per_step=2)
    tokens, hidden, inner, heads = 2 * 128, 128, 384, 4
    by_hand = 4 * tokens * (10 * hidden + 3 * inner + heads + 4)
    more = rank_memory(few.changed(model=olmo2().model_copy(update={"layers": 7})), 0)
    assert more.activations - rank_memory(few, 0).activations == by_hand


def test_recomputation_keeps_less_and_full_keeps_one_input_a_layer() -> None:
    def kept(recompute: str) -> int:
        return rank_memory(cpu_job(olmo2(), recompute=recompute), 0).activations

    assert kept("none") > kept("selective") > kept("full")
    hidden_states = 4 * 128 * 128 * 4
    # Six layers and the final norm; cos and sin are a quarter of a hidden state here.
    assert 7 * hidden_states < kept("full") < 8 * hidden_states


@pytest.mark.parametrize(
    ("schedule", "virtual_stages"),
    [("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1), ("zero_bubble", 2), ("zbv", 2)],
)
@pytest.mark.parametrize("microbatches", [2, 4, 12])
def test_microbatches_in_flight_are_few_in_every_schedule(
    schedule: Schedule, virtual_stages: int, microbatches: int
) -> None:
    """The most that are between forward and the last of their backward, by the known formulas."""
    p, v, m = 4, virtual_stages, microbatches
    plan = PipelinePlan.make(p * v, p, schedule, v)
    a_round = m // max(1, m // p)
    for rank in range(p):
        ones = dict.fromkeys(plan.stages_of(rank), 1)
        held = most_held(computations(plan, rank, m), ones)
        behind = p - 1 - rank
        assert (
            held
            <= {
                "1f1b": behind + 1,
                "interleaved": (v - 1) * a_round + 2 * behind + 1,
                "zero_bubble": (v - 1) * a_round + p,
                "zbv": 2 * p,
            }[schedule]
        )
        assert held <= v * m


def test_kv_cache_is_the_engines() -> None:
    model = llama3()
    engine = Engine([Stage(model).initialise_(0)], Mesh.alone(), slots=10, longest=100)
    held = sum(c.keys.nbytes + c.values.nbytes for c in engine.caches)
    assert kv_cache_bytes(cpu_job(model), 0, Rollouts(10, 60, 40)) == held


def test_the_worst_rank_is_the_worst_of_all() -> None:
    for schedule, v in (("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1)):
        job = Job(seventy_billion(), 64, 1, 4096, tp=4, pp=8, schedule=schedule, virtual_stages=v)  # type: ignore[arg-type]
        peaks = [rank_memory(job, rank).peak for rank in range(0, job.gpus, job.tp)]
        assert worst_rank(job)[1].peak == max(peaks)
        assert len(set(peaks)) > 1
