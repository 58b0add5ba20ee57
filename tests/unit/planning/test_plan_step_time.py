"""The roofline against arithmetic done here, and the directions in which it must move."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planned_jobs import llama3, seventy_billion

from megarlx.comm.hardware import (
    ATTENTION,
    CACHE,
    COPY,
    DECODE_KERNEL,
    DECODE_KERNELS_OF_LAYER,
    GPUS,
    PRODUCTS,
    Gpu,
    gpu_named,
)
from megarlx.config.model import family_config
from megarlx.planning.job import Job
from megarlx.planning.memory import Rollouts
from megarlx.planning.rollouts import rollout_time
from megarlx.planning.step_time import mfu, step_time

# Arithmetic and links cost nothing beside the one thing that a test looks at.
ENDLESS = Gpu("endless", {"bf16": 1e30, "tf32": 1e30}, 1e30, 1e30, 1e30, 1e30)
ONE_BILLION = family_config(
    "olmo2", vocab_size=100_352, hidden_size=2048, layers=16, heads=16, intermediate_size=8192
)


def big(**changes: object) -> Job:
    return Job(seventy_billion(), 256, 1, 4096, tp=8, sequence_parallel=True, **changes)  # type: ignore[arg-type]


def test_products_are_six_flop_a_parameter_and_token() -> None:
    job = Job(ONE_BILLION, 8, 8, 4096)
    gpu = replace(ENDLESS, rates={"bf16": 1e15})
    matrices = 16 * (4 * 2048 * 2048 + 3 * 2048 * 8192) + 100_352 * 2048
    by_hand = 6 * matrices * 8 * 4096 / (1e15 * PRODUCTS)
    assert step_time(job, gpu).products == pytest.approx(by_hand, rel=1e-9)


def test_attention_is_causal_and_its_backward_two_and_a_half_forwards() -> None:
    job = Job(ONE_BILLION, 8, 4, 4096)
    pairs = 8 * 4096 * 4097 / 2  # (query, key) that see each other, in all sequences
    by_hand = 3.5 * 16 * 4 * 2048 * pairs / (1e15 * ATTENTION)
    assert step_time(job, replace(ENDLESS, rates={"bf16": 1e15})).attention == pytest.approx(
        by_hand
    )


def test_products_go_at_the_rate_of_their_precision() -> None:
    def seconds(kind: str, **changes: object) -> float:
        return step_time(Job(ONE_BILLION, 8, 8, 4096, **changes), GPUS[kind]).products  # type: ignore[arg-type]

    half, tf32 = seconds("h100"), seconds("h100", precision="fp32")
    plain = seconds("h100", precision="fp32", tf32=False)
    assert tf32 == pytest.approx(2 * half, rel=0.01)
    assert plain > 7 * tf32
    # of the layers alone: the head stays in bf16
    assert 0.6 * half < seconds("h100", fp8=True) < 0.8 * half
    with pytest.raises(ValueError, match=r"'a100', which has no fp8; it has bf16, tf32, fp32"):
        seconds("a100", fp8=True)


def test_no_step_is_planned_faster_than_the_peak_of_its_arithmetic() -> None:
    for changes, peak in (
        ({"precision": "fp32", "tf32": False}, 67e12),
        ({"precision": "fp32"}, 495e12),
        ({"precision": "fp64"}, 67e12),
        ({}, 989e12),
    ):
        job = Job(ONE_BILLION, 512, 4, 4096, dp=8, **changes)  # type: ignore[arg-type]
        work = job.flops_per_step / step_time(job, GPUS["h100"]).total
        assert 0.2 * 8 * peak < work < 8 * peak, changes


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_the_optimizer_moves_ten_and_twenty_bytes_a_number(objectives: int) -> None:
    job = Job(ONE_BILLION, 8, 1, 4096, dp=8, objectives=objectives)
    gpu = replace(ENDLESS, memory_bandwidth=3e12)
    numbers = ONE_BILLION.parameters()  # the vocabulary is a multiple of 128: nothing is padded
    moved = numbers / 8 * (10 + 20 * objectives + 4 * objectives) + numbers * 4 * objectives
    assert step_time(job, gpu).optimizer == pytest.approx(moved / (3e12 * 0.9), rel=1e-9)


def test_data_links_carry_the_gradients_once_and_the_weights_once() -> None:
    # Over eight GPUs of a node, with nothing to hide the reduction behind.
    job = Job(ONE_BILLION, 8, 1, 4096, dp=8)
    gpu = replace(ENDLESS, node_bandwidth=450e9)
    by_hand = ONE_BILLION.parameters() * 7 / 8 * (4 + 2) / (450e9 * 0.8)
    assert step_time(job, gpu).data_links == pytest.approx(by_hand, rel=1e-3)


def test_the_bubble_is_that_of_the_schedule() -> None:
    job = big(pp=8)
    time = step_time(job, ENDLESS)
    idle = time.bubble / (time.total - time.data_links - time.optimizer)
    assert job.microbatches == 256
    assert idle == pytest.approx(7 / (256 + 7))


def test_mfu_counts_no_recomputation_and_no_more_than_the_peak() -> None:
    gpu = GPUS["h100"]
    kept, again = big(pp=8), big(pp=8, recompute="full")
    assert mfu(kept, gpu, 10.0) == mfu(again, gpu, 10.0)
    flops = seventy_billion().flops_per_token(4096) * 256 * 4096
    assert mfu(kept, gpu, 10.0) == pytest.approx(flops / (10 * 64 * 989e12))
    for job in (kept, again):
        assert 0 < mfu(job, gpu, step_time(job, gpu).total) < PRODUCTS


def test_full_recomputation_costs_about_a_third_more_arithmetic() -> None:
    gpu = replace(ENDLESS, rates={"bf16": 1e15})
    kept, again = step_time(big(pp=8), gpu), step_time(big(pp=8, recompute="full"), gpu)
    layers_only = kept.products + kept.attention
    assert 0.28 * layers_only < again.recomputation < 0.34 * layers_only


def test_more_micro_batches_make_a_smaller_bubble_and_more_ranks_a_larger_one() -> None:
    gpu = GPUS["h100"]

    def share(job: Job) -> float:
        time = step_time(job, gpu)
        return time.bubble / time.total

    assert share(big(pp=8)) < share(big(pp=8, dp=4)) < share(big(pp=8, dp=16))
    assert share(big(pp=4)) < share(big(pp=8)) < share(big(pp=16))
    interleaved = big(pp=8, schedule="interleaved", virtual_stages=2)
    assert share(interleaved) < share(big(pp=8))


def test_links_between_nodes_are_shared_by_the_groups_of_a_node() -> None:
    gpu = GPUS["h100"]
    assert gpu.link_bandwidth(1, 8) == pytest.approx(450e9 * 0.8)
    assert gpu.link_bandwidth(8, 4) == pytest.approx(50e9 * 0.8)  # one member on each node
    assert gpu.link_bandwidth(2, 16) == pytest.approx(4 * 50e9 * 0.8)  # four, each with its card


def test_a_token_of_one_sequence_is_the_time_to_read_the_weights_and_of_its_kernels() -> None:
    job = Job(ONE_BILLION, 8, 1, 4096)
    gpu = replace(ENDLESS, memory_bandwidth=3.35e12)
    time = rollout_time(job, gpu, Rollouts(1, 1, 1))
    read = (16 * (4 * 2048 * 2048 + 3 * 2048 * 8192) + 100_352 * 2048) * 2 / (3.35e12 * 0.9)
    kernels = 16 * DECODE_KERNELS_OF_LAYER * DECODE_KERNEL
    assert time.token_seconds == pytest.approx(read + kernels, rel=2e-3)


def test_rollouts_read_the_cache_of_every_slot() -> None:
    job = Job(ONE_BILLION, 8, 1, 4096)
    gpu = replace(ENDLESS, memory_bandwidth=3.35e12)
    few, many = (rollout_time(job, gpu, Rollouts(n, 512, 1024)) for n in (32, 64))
    # 32 more slots at 1,024 tokens on average: keys and values of 16 layers, and their logits
    # (an fp32 pass, and written in bf16 by the product) and hidden states.
    cache = 32 * 1024 * 16 * 2 * 2048 * 2
    logits = 32 * 100_352 * (4 + 2)
    added = (many.token_seconds - few.token_seconds) * 3.35e12
    assert added == pytest.approx(cache / CACHE + logits / COPY, rel=0.02)


def test_tensor_parallel_rollouts_read_less_and_wait_for_sums() -> None:
    gpu, rollouts = GPUS["h100"], Rollouts(64, 512, 1024)
    one = rollout_time(Job(llama3(), 8, 1, 1024), gpu, rollouts)
    two = rollout_time(Job(llama3(), 8, 1, 1024, tp=2), gpu, rollouts)
    assert two.token_seconds > one.token_seconds  # a small model: latency is all there is
    big_one = rollout_time(Job(seventy_billion(), 8, 1, 4096), gpu, rollouts)
    big_eight = rollout_time(Job(seventy_billion(), 8, 1, 4096, tp=8), gpu, rollouts)
    assert big_eight.token_seconds < big_one.token_seconds / 4


def test_a_device_is_known_by_the_name_that_cuda_gives_it() -> None:
    for device, name in (
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA H200", "h200"),
    ):
        assert gpu_named(device) is GPUS[name]
    assert gpu_named("NVIDIA GeForce RTX 4090") is None
