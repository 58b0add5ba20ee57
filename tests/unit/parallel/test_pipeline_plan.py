"""The plan against torch's own schedules, which are made here without any process group."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

from megarlx.parallel.pipeline_plan import SCHEDULES, PipelinePlan

KINDS = {
    "1f1b": torch_schedules.ScheduleGPipe,  # any count; same length and bubble as 1F1B
    "interleaved": torch_schedules.ScheduleInterleaved1F1B,
    "zero_bubble": torch_schedules.ScheduleInterleavedZeroBubble,
    "zbv": torch_schedules.ScheduleZBVZeroBubble,
    "evaluation": torch_schedules.ScheduleLoopedBFS,
}
SHAPES = [
    ("1f1b", 2, 1), ("1f1b", 3, 1), ("1f1b", 4, 1),
    ("interleaved", 2, 2), ("interleaved", 3, 2), ("interleaved", 4, 2), ("interleaved", 4, 3),
    ("zero_bubble", 2, 1), ("zero_bubble", 3, 1), ("zero_bubble", 4, 1), ("zero_bubble", 4, 2),
    ("zbv", 2, 2), ("zbv", 3, 2), ("zbv", 4, 2),
]  # fmt: skip


class FakeStage:
    """As much of a stage as a schedule looks at before it runs."""

    def __init__(self, index: int, stages: int, size: int) -> None:
        self.stage_index, self.num_stages = index, stages
        self.group_size, self.group_rank = size, 0
        self.is_first, self.is_last = index == 0, index == stages - 1
        self.submod = torch.nn.Identity()


def torch_schedule(name: str, size: int, virtual: int, microbatches: int) -> Any:
    stages: list[Any] = [FakeStage(i * size, size * virtual, size) for i in range(virtual)]
    if name == "1f1b":
        return KINDS[name](stages[0], microbatches, loss_fn=torch.sum)
    return KINDS[name](stages, microbatches, loss_fn=torch.sum)


# Time of a stage's forward, input gradient, weight gradient, and of both gradients at once.
UNITS = {"F": 1, "I": 1, "W": 1, "B": 2}


def measured_bubble(orders: dict[int, list[Any]], stages: int) -> float:
    """The idle share when every action starts as soon as its rank and its inputs are there."""
    todo = {
        rank: [a for a in order if a is not None and a.computation_type.value in UNITS]
        for rank, order in orders.items()
    }
    clock = dict.fromkeys(todo, 0)
    done: dict[tuple[str, int, int], int] = {}
    work = sum(UNITS[a.computation_type.value] for order in todo.values() for a in order)
    while any(todo.values()):
        rank, action = next(
            (rank, order[0])
            for rank, order in todo.items()
            if order and all(key in done for key in needs(order[0], stages))
        )
        todo[rank].pop(0)
        kind = action.computation_type.value
        start = max([clock[rank], *(done[key] for key in needs(action, stages))])
        clock[rank] = start + UNITS[kind]
        what = "gradient" if kind in "IB" else kind
        done[what, action.stage_index, action.microbatch_index] = clock[rank]
    return 1 - work / (max(clock.values()) * len(clock))


def needs(action: Any, stages: int) -> list[tuple[str, int, int]]:
    stage, microbatch = action.stage_index, action.microbatch_index
    kind = action.computation_type.value
    if kind == "F":
        return [("F", stage - 1, microbatch)] if stage else []
    if kind == "W":
        return [("gradient", stage, microbatch)]
    forward = [("F", stage, microbatch)]
    return forward if stage == stages - 1 else [*forward, ("gradient", stage + 1, microbatch)]


@pytest.mark.parametrize(("schedule", "size", "virtual"), SHAPES)
def test_bubble_formula_equals_the_schedule_played_through(schedule, size, virtual):
    plan = PipelinePlan.make(size * virtual, size, schedule, virtual)
    exact_from = 2 * size - 1 if schedule == "zbv" else size
    for microbatches in filter(plan.allows, range(1, 17)):
        order = torch_schedule(schedule, size, virtual, microbatches).pipeline_order
        measured = measured_bubble(order, plan.stages)
        if microbatches >= exact_from:
            assert plan.bubble_fraction(microbatches) == pytest.approx(measured, abs=1e-12)
        else:
            assert plan.bubble_fraction(microbatches) <= measured + 1e-12


@pytest.mark.parametrize(("schedule", "size", "virtual"), SHAPES)
def test_allowed_microbatch_counts_are_those_torch_accepts(schedule, size, virtual):
    plan = PipelinePlan.make(size * virtual, size, schedule, virtual)
    for microbatches in range(1, 20):
        if plan.allows(microbatches):
            plan.check_microbatches(microbatches)
            torch_schedule(schedule, size, virtual, microbatches)
        else:
            with pytest.raises(ValueError, match="micro"):
                torch_schedule(schedule, size, virtual, microbatches)
            with pytest.raises(ValueError, match=f"cannot run {microbatches} micro-batches"):
                plan.check_microbatches(microbatches)


def test_refused_microbatch_count_names_counts_that_work():
    plan = PipelinePlan.make(8, 4, "interleaved", 2)
    with pytest.raises(ValueError, match=r"up to 7, or .* at least 4\. Nearest: 8, 10, 12$"):
        plan.check_microbatches(11)
    with pytest.raises(ValueError, match="cannot run 0"):
        plan.check_microbatches(0)


@pytest.mark.parametrize(("schedule", "size", "virtual"), SHAPES)
def test_stages_lie_on_the_ranks_where_torch_sends_to(schedule, size, virtual):
    plan = PipelinePlan.make(size * virtual, size, schedule, virtual)
    style = "v" if schedule == "zbv" else "loop"
    expected = generate_stage_to_rank_mapping(size, plan.stages, style)
    assert {stage: plan.rank_of(stage) for stage in range(plan.stages)} == expected
    held = [stage for rank in range(size) for stage in plan.stages_of(rank)]
    assert sorted(held) == list(range(plan.stages))
    assert all(plan.rank_of(s) == rank for rank in range(size) for s in plan.stages_of(rank))


@pytest.mark.parametrize(("schedule", "size", "virtual"), [s for s in SHAPES if s[0] != "1f1b"])
def test_no_schedule_hangs_when_sends_and_receives_run_strictly_in_order(schedule, size, virtual):
    """NCCL may put all point-to-point of a group on one stream: in the worst case each send and
    each receive waits for its other half before anything after it can start. (1F1B joins each
    send with the receive from the same neighbour, so it has no order to get wrong.)"""
    plan = PipelinePlan.make(size * virtual, size, schedule, virtual)
    evaluation = "zbv" if schedule == "zbv" else "evaluation"
    for microbatches in filter(plan.allows, range(1, 13)):
        play_exchanges(torch_schedule(schedule, size, virtual, microbatches), ("F", "B"))
        play_exchanges(torch_schedule(evaluation, size, virtual, microbatches), ("F",))


def play_exchanges(schedule: Any, directions: tuple[str, ...]) -> None:
    wanted = [f"{verb}_{direction}" for verb in ("SEND", "RECV") for direction in directions]
    todo = {
        rank: [a for a in order if a.computation_type.value in wanted]
        for rank, order in schedule.pipeline_order_with_comms.items()
    }
    while any(todo.values()):
        heads = {rank: half(order[0]) for rank, order in todo.items() if order}
        pairs = [(a, b) for a, b in itertools.combinations(heads, 2) if heads[a] == heads[b]]
        assert pairs, f"every rank waits: {heads}"
        for rank in pairs[0]:
            todo[rank].pop(0)


def half(action: Any) -> tuple[str, int, int]:
    """What is sent, named the same by sender and receiver: direction, lower stage, micro-batch."""
    verb, direction = action.computation_type.value.split("_")
    towards = 1 if direction == "F" else -1
    sender = action.stage_index if verb == "SEND" else action.stage_index - towards
    return direction, sender, action.microbatch_index


@st.composite
def possible_splits(draw: st.DrawFn) -> tuple[int, int, str, int]:
    schedule = draw(st.sampled_from(SCHEDULES))
    least = {"1f1b": 1, "interleaved": 2, "zero_bubble": 1, "zbv": 2}[schedule]
    most = {"1f1b": 1, "interleaved": 4, "zero_bubble": 4, "zbv": 2}[schedule]
    size, virtual = draw(st.integers(2, 6)), draw(st.integers(least, most))
    return draw(st.integers(size * virtual, 90)), size, schedule, virtual


@given(possible_splits())
def test_an_even_split_tiles_the_layers_and_spares_both_ends(split):
    layers, *_ = split
    plan = PipelinePlan.make(*split)
    held = [layer for first, end in plan.layers for layer in range(first, end)]
    assert held == list(range(layers))
    counts = [end - first for first, end in plan.layers]
    assert max(counts) - min(counts) <= 1
    # The stages with embedding and head never hold more than those between.
    assert max(counts[0], counts[-1]) <= max(counts[1:-1], default=layers)


def test_layers_per_stage_is_taken_as_given():
    plan = PipelinePlan.make(7, 4, "1f1b", 1, (2, 3, 2, 0))
    assert plan.layers == ((0, 2), (2, 5), (5, 7), (7, 7))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 4, "1f1b", 1), r"3 layers cannot fill 4 stages .* a size of 1 to 3 would do"),
        ((4, 2, "interleaved", 5), r"4 layers cannot fill 10 stages .* no size would do"),
        ((8, 2, "gpipe", 1), r"schedule is 'gpipe'; allowed are 1f1b, interleaved"),
        ((8, 2, "1f1b", 2), r"virtual_stages is 2; schedule '1f1b' needs exactly 1"),
        ((8, 2, "interleaved", 1), r"virtual_stages is 1; .* needs at least 2"),
        ((8, 2, "zbv", 3), r"virtual_stages is 3; .* needs exactly 2"),
        ((8, 0, "1f1b", 1), r"size is 0"),
        ((8, 1, "zero_bubble", 1), r"size is 1 with schedule 'zero_bubble'"),
        ((8, 2, "1f1b", 1, (3, 3, 2)), r"\(3, 3, 2\) has 3 entries; there are 2 stages"),
        ((8, 2, "1f1b", 1, (3, 4)), r"\(3, 4\) adds up to 7; the model has 8"),
        ((8, 3, "1f1b", 1, (5, 0, 3)), r"only the first and the last stage may hold no layer"),
        ((8, 2, "1f1b", 1, (9, -1)), r"none a negative number"),
    ],
)
def test_an_impossible_split_is_refused_with_the_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        PipelinePlan.make(*arguments)
