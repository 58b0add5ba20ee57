"""What each rank of a pipeline does in a step, and in which order.

Pure data: a plan and a number of micro-batches give the same lists on every rank, so ranks need not
tell each other anything, and a schedule can be looked at without a process group.

    p  ranks in the pipeline      v  stages on each rank      m  micro-batches of a step
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from typing import Literal, NamedTuple

from megarlx.parallel.pipeline_plan import PipelinePlan

Kind = Literal[
    "forward",
    "backward",  # of inputs and weights at once
    "backward_inputs",
    "backward_weights",
    "send_hidden",
    "receive_hidden",
    "send_gradient",
    "receive_gradient",
]


class Action(NamedTuple):
    kind: Kind
    stage: int
    microbatch: int


Actions = tuple[Action, ...]
_EXCHANGES: dict[str, tuple[Kind, Kind]] = {
    "hidden": ("send_hidden", "receive_hidden"),
    "gradient": ("send_gradient", "receive_gradient"),
}


@lru_cache(maxsize=256)
def rank_actions(plan: PipelinePlan, rank: int, microbatches: int, training: bool) -> Actions:
    """The actions of one rank, in the order in which it does them."""
    return _all_actions(plan, microbatches, training)[rank]


@lru_cache(maxsize=256)
def computations(plan: PipelinePlan, rank: int, microbatches: int) -> Actions:
    """The forward and backward actions of a rank's training step, without the exchanges."""
    return tuple(_order(plan, rank, microbatches, training=True))


def most_held(
    actions: Actions,
    between: dict[int, int],
    within: dict[int, int] | None = None,
    after: dict[int, int] | None = None,
) -> int:
    """The most that a rank holds at once, when a micro-batch of a stage is worth `between[stage]`
    from its forward to its backward and, where backward is split, at most `within[stage]` in the
    backward of inputs and `after[stage]` from then to that of weights."""
    within = between if within is None else within
    after = between if after is None else after
    held = most = 0
    for kind, stage, _ in actions:
        if kind == "forward":
            held += between[stage]
            most = max(most, held)
        elif kind == "backward":
            held -= between[stage]
        elif kind == "backward_inputs":
            held -= between[stage]
            most = max(most, held + within[stage])
            held += after[stage]
        elif kind == "backward_weights":
            held -= after[stage]
    return most


def _order(plan: PipelinePlan, rank: int, m: int, training: bool) -> Iterator[Action]:
    if not training:
        for stage, part in _rounds(plan.stages_of(rank), m, min(m, plan.size)):
            yield Action("forward", stage, part)
    elif plan.schedule == "zbv":
        yield from _zbv(plan, rank, m)
    else:
        yield from _one_forward_one_backward(plan, rank, m)


def _rounds(stages: tuple[int, ...], m: int, length: int) -> Iterator[tuple[int, int]]:
    """Each round of micro-batches goes through all stages of the rank before the next begins."""
    for first in range(0, m, length):
        for stage in stages:
            for part in range(first, min(first + length, m)):
                yield stage, part


def _one_forward_one_backward(plan: PipelinePlan, rank: int, m: int) -> Iterator[Action]:
    """1F1B, interleaved and zero-bubble: some forwards ahead, then forward and backward in turn.

    Where backward is split, rank r makes a micro-batch's weight gradients r backwards later: there
    they fill what would be the bubble, and hold no more than 1F1B's first rank does.
    """
    split, v = plan.splits_backward, plan.virtual_stages
    length = m // max(1, m // plan.size) if v > 1 else m
    stages = plan.stages_of(rank)
    forwards = _rounds(stages, m, length)
    backwards = list(_rounds(stages[::-1], m, length))
    # Until the first gradient is back: its way down is 2 steps a rank, or 1 where the backward of
    # weights, and of one stage alone, leaves room for no more.
    steps_back = 1 if split or v == 1 else 2
    ahead = (v - 1) * length + steps_back * (plan.size - 1 - rank)
    for stage, part in islice(forwards, ahead):
        yield Action("forward", stage, part)
    lag = rank if split else 0
    for number, (stage, part) in enumerate(backwards):
        for forward in islice(forwards, 1):
            yield Action("forward", *forward)
        yield Action("backward_inputs" if split else "backward", stage, part)
        if split and number >= lag:
            yield Action("backward_weights", *backwards[number - lag])
    for stage, part in backwards[max(0, len(backwards) - lag) :]:
        yield Action("backward_weights", stage, part)


def _zbv(plan: PipelinePlan, rank: int, m: int) -> Iterator[Action]:
    """Two stages a rank, the second row running back, so that rank 0 has both ends of the model.

    F, I and W are forward, backward of inputs and of weights; 0 and 1 the rank's stages.
    """
    p = plan.size
    whole = max(m, 2 * p - 1)  # with fewer, what is not there is left out
    order = ["F0"] * (2 * (p - rank) - 1) + ["F1", "F0"] * rank + ["F1", "I1", "W1"] * (p - rank)
    forwards_left = whole - (2 * p - 1 - rank)
    for number in range(whole - p):
        order += ["F0"] * (number < forwards_left) + ["I0", "W0", "F1", "I1", "W1"]
    order += ["I0", "I1"] * rank + ["I0", "W0"] * (p - rank) + ["W1"] * rank + ["W0"] * rank
    kinds: dict[str, Kind] = {"F": "forward", "I": "backward_inputs", "W": "backward_weights"}
    done = dict.fromkeys(order, 0)
    for step in order:
        if done[step] < m:
            yield Action(kinds[step[0]], plan.stages_of(rank)[int(step[1])], done[step])
        done[step] += 1


@lru_cache(maxsize=64)
def _all_actions(plan: PipelinePlan, m: int, training: bool) -> tuple[Actions, ...]:
    """Every rank's list with its exchanges.

    The steps are played through. A send and its receive enter both lists at the same moment, so
    there is one order of all exchanges that every list keeps: nothing hangs even if each send and
    each receive waits for its other half before anything after it begins.
    """
    todo = [list(_order(plan, rank, m, training))[::-1] for rank in range(plan.size)]
    lists: list[list[Action]] = [[] for _ in todo]
    there: set[tuple[str, int, int]] = set()  # what a stage can begin with
    last = plan.stages - 1
    while any(todo):
        played = 0
        for rank, left in enumerate(todo):
            if not left or not _begins(left[-1], last, there):
                continue
            action = left.pop()
            lists[rank].append(action)
            played += 1
            handed = _handed_on(action, last)
            if handed is None:
                continue
            what, taker = handed
            there.add((what, taker, action.microbatch))
            if plan.rank_of(taker) != rank:
                send, receive = _EXCHANGES[what]
                lists[rank].append(Action(send, action.stage, action.microbatch))
                lists[plan.rank_of(taker)].append(Action(receive, taker, action.microbatch))
        if not played:
            raise AssertionError(f"pipeline: the {plan.schedule} schedule of {m} does not end")
    return tuple(map(tuple, lists))


def _begins(action: Action, last: int, there: set[tuple[str, int, int]]) -> bool:
    kind, stage, part = action
    if kind == "forward":
        return stage == 0 or ("hidden", stage, part) in there
    return kind == "backward_weights" or stage == last or ("gradient", stage, part) in there


def _handed_on(action: Action, last: int) -> tuple[Literal["hidden", "gradient"], int] | None:
    """What an action makes for another stage, and for which."""
    kind, stage, _ = action
    if kind == "forward" and stage < last:
        return "hidden", stage + 1
    if kind in ("backward", "backward_inputs") and stage > 0:
        return "gradient", stage - 1
    return None
