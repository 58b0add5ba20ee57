"""The plan against torch's own schedules, which are made here without any process group.

torch's schedules are one reference; what they must do at all (begin when the inputs are there, not
hang, keep to the formula of the bubble) is checked for ours alone.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from megarlx.parallel.pipeline_actions import Action, computations, rank_actions
from megarlx.parallel.pipeline_plan import SCHEDULES, PipelinePlan

KINDS = {
    "1f1b": torch_schedules.ScheduleGPipe,  # any count; same length and bubble as 1F1B
    "interleaved": torch_schedules.ScheduleInterleaved1F1B,
    "zero_bubble": torch_schedules.ScheduleInterleavedZeroBubble,
    "zbv": torch_schedules.ScheduleZBVZeroBubble,
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
UNITS = {"forward": 1, "backward_inputs": 1, "backward_weights": 1, "backward": 2}
LETTERS = {"F": "forward", "I": "backward_inputs", "W": "backward_weights", "B": "backward"}


def orders(plan: PipelinePlan, microbatches: int) -> dict[int, list[Action]]:
    return {rank: list(computations(plan, rank, microbatches)) for rank in range(plan.size)}


def measured_bubble(todo: dict[int, list[Action]], stages: int) -> float:
    """The idle share when every action starts as soon as its rank and its inputs are there."""
    clock = dict.fromkeys(todo, 0)
    done: dict[tuple[str, int, int], int] = {}
    work = sum(UNITS[action.kind] for order in todo.values() for action in order)
    while any(todo.values()):
        rank, action = next(
            (rank, order[0])
            for rank, order in todo.items()
            if order and all(key in done for key in needs(order[0], stages))
        )
        todo[rank].pop(0)
        start = max([clock[rank], *(done[key] for key in needs(action, stages))])
        clock[rank] = start + UNITS[action.kind]
        what = "gradient" if action.kind in ("backward", "backward_inputs") else action.kind
        done[what, action.stage, action.microbatch] = clock[rank]
    return 1 - work / (max(clock.values()) * len(clock))


def needs(action: Action, stages: int) -> list[tuple[str, int, int]]:
    kind, stage, microbatch = action
    if kind == "forward":
        return [("forward", stage - 1, microbatch)] if stage else []
    if kind == "backward_weights":
        return [("gradient", stage, microbatch)]
    forward = [("forward", stage, microbatch)]
    return forward if stage == stages - 1 else [*forward, ("gradient", stage + 1, microbatch)]


@pytest.mark.parametrize(("schedule", "size", "virtual"), SHAPES)
def test_bubble_formula_equals_the_schedule_played_through(schedule, size, virtual):
    plan = PipelinePlan.make(size * virtual, size, schedule, virtual)
    exact_from = 2 * size - 1 if schedule == "zbv" else size
    for microbatches in filter(plan.allows, range(1, 17)):
        measured = measured_bubble(orders(plan, microbatches), plan.stages)
        if microbatches >= exact_from:
            assert plan.bubble_fraction(microbatches) == pytest.approx(measured, abs=1e-12)
        else:
            assert plan.bubble_fraction(microbatches) <= measured + 1e-12


@pytest.mark.parametrize(("schedule", "size", "virtual"), [s for s in SHAPES if s[0] != "1f1b"])
def test_the_order_of_computations_is_that_of_torchs_schedule(schedule, size, virtual):
    plan = PipelinePlan.make(size * virtual, size, schedule, virtual)
    for microbatches in filter(plan.allows, range(1, 17)):
        theirs = torch_schedule(schedule, size, virtual, microbatches).pipeline_order
        for rank, order in orders(plan, microbatches).items():
            assert order == [
                (LETTERS[a.computation_type.value], a.stage_index, a.microbatch_index)
                for a in theirs[rank] if a is not None
            ]  # fmt: skip


@pytest.mark.parametrize(("schedule", "size", "virtual"), SHAPES)
def test_every_rank_does_all_of_its_work_once_and_evaluation_only_goes_forward(
    schedule, size, virtual
):
    plan = PipelinePlan.make(size * virtual, size, schedule, virtual)
    halves = ("backward_inputs", "backward_weights") if plan.splits_backward else ("backward",)
    for microbatches in (1, 2, 3, 8):
        for training, kinds in ((True, ("forward", *halves)), (False, ("forward",))):
            if training and not plan.allows(microbatches):
                continue
            for rank in range(size):
                work = itertools.product(kinds, plan.stages_of(rank), range(microbatches))
                done = rank_actions(plan, rank, microbatches, training)
                assert sorted(a for a in done if a.kind in kinds) == sorted(work)
                sends = [a.kind for a in done if a.kind.startswith("send")]
                hidden, gradients = plan.sends_per_step(rank, microbatches)
                assert sends.count("send_hidden") == hidden
                assert sends.count("send_gradient") == (gradients if training else 0)


@pytest.mark.parametrize(("schedule", "size", "virtual"), SHAPES)
def test_weight_gradients_of_a_stage_follow_in_the_order_of_its_input_gradients(
    schedule, size, virtual
):
    """A layer keeps what it put off in a queue."""
    plan = PipelinePlan.make(size * virtual, size, schedule, virtual)
    for microbatches in filter(plan.allows, range(1, 17)):
        for rank in range(size):
            order = computations(plan, rank, microbatches)
            for stage in plan.stages_of(rank) if plan.splits_backward else ():
                inputs, weights = (
                    [a.microbatch for a in order if a.stage == stage and a.kind == kind]
                    for kind in ("backward_inputs", "backward_weights")
                )
                assert inputs == weights == list(range(microbatches))


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
def test_stages_are_dealt_out_in_turn_and_in_zbv_run_back(schedule, size, virtual):
    plan = PipelinePlan.make(size * virtual, size, schedule, virtual)
    ranks = list(range(size))
    expected = ranks + ranks[::-1] if schedule == "zbv" else ranks * virtual
    assert [plan.rank_of(stage) for stage in range(plan.stages)] == expected
    held = [stage for rank in range(size) for stage in plan.stages_of(rank)]
    assert sorted(held) == list(range(plan.stages))
    assert all(plan.rank_of(s) == rank for rank in range(size) for s in plan.stages_of(rank))


@pytest.mark.parametrize(("schedule", "size", "virtual"), SHAPES)
def test_no_schedule_hangs_when_sends_and_receives_run_strictly_in_order(schedule, size, virtual):
    """NCCL may put all point-to-point of a group on one stream: in the worst case each send and
    each receive waits for its other half before anything after it can start."""
    plan = PipelinePlan.make(size * virtual, size, schedule, virtual)
    for microbatches in range(1, 13):
        play_exchanges(plan, microbatches, training=False)
        if plan.allows(microbatches):
            play_exchanges(plan, microbatches, training=True)


def play_exchanges(plan: PipelinePlan, microbatches: int, *, training: bool) -> None:
    todo = {
        rank: [
            action
            for action in rank_actions(plan, rank, microbatches, training)
            if action.kind.startswith(("send", "receive"))
        ]
        for rank in range(plan.size)
    }
    while any(todo.values()):
        heads = {rank: half(order[0]) for rank, order in todo.items() if order}
        pairs = [(a, b) for a, b in itertools.combinations(heads, 2) if heads[a] == heads[b]]
        assert pairs, f"every rank waits: {heads}"
        for rank in pairs[0]:
            todo[rank].pop(0)


def half(action: Action) -> tuple[str, int, int]:
    """What is sent, named the same by sender and receiver: what, the stage sending, micro-batch."""
    verb, what = action.kind.split("_")
    towards = 1 if what == "hidden" else -1
    sender = action.stage if verb == "send" else action.stage - towards
    return what, sender, action.microbatch


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
