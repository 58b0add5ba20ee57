"""The collectives against one process: values, gradients, bytes, and what a dead peer looks like.

n ranks; tensors are fp64 unless a test is about dtypes; no two dimensions are equal.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megarlx.comm import collectives as c
from megarlx.comm import differentiable as d
from megarlx.comm.exchange import all_to_all
from megarlx.comm.groups import Group, Mesh

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64]
SIZES = [1, 2, 3, 4]


def tensor_of(rank: int, *shape: int, salt: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * salt + rank)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def whole_numbers(rank: int, *shape: int) -> Tensor:
    """Small enough to add without rounding in every dtype."""
    return (tensor_of(rank, *shape) * 4).round()


def tp_group(size: int, timeout_seconds: float = 20) -> Group:
    return Mesh.build(tp=size, timeout_seconds=timeout_seconds).tp


# Plain operations.


def every_operation(n: int, dtype: torch.dtype) -> dict[str, Tensor]:
    group = tp_group(n)
    mine = whole_numbers(group.rank, 3 * n, 5).to(dtype)
    out = {
        f"all_reduce {op}": c.all_reduce_(mine.clone(), group, op) for op in ("sum", "max", "min")
    }
    out["all_gather 0"] = c.all_gather(mine, group)
    out["all_gather -1"] = c.all_gather(mine, group, dim=-1)
    out["reduce_scatter 0"] = c.reduce_scatter(mine, group)
    out["reduce_scatter 1"] = c.reduce_scatter(mine.t(), group, dim=1)
    out["broadcast"] = c.broadcast_(mine.clone(), group, source=n - 1)
    assert torch.equal(mine, whole_numbers(group.rank, 3 * n, 5).to(dtype)), "input was changed"
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_every_operation_gives_what_one_process_computes(run, n, dtype):
    inputs = torch.stack([whole_numbers(rank, 3 * n, 5) for rank in range(n)])
    total = inputs.sum(0)
    for rank, out in enumerate(run(n, every_operation, n, dtype)):
        expected = {
            "all_reduce sum": total,
            "all_reduce max": inputs.amax(0),
            "all_reduce min": inputs.amin(0),
            "all_gather 0": inputs.flatten(0, 1),
            "all_gather -1": torch.cat(list(inputs), dim=-1),
            "reduce_scatter 0": total[3 * rank : 3 * rank + 3],
            "reduce_scatter 1": total.t()[:, 3 * rank : 3 * rank + 3],
            "broadcast": inputs[-1],
        }
        assert out.keys() == expected.keys()
        for name, value in expected.items():
            assert out[name].dtype == dtype
            assert torch.equal(out[name].double(), value), (rank, name)


def non_contiguous_inputs(n: int) -> list[Tensor]:
    group = tp_group(n)
    base = tensor_of(group.rank, 4, 3, 5)
    reduced, sent = base.clone(), base.clone()
    c.all_reduce_(reduced[:, 1:2].transpose(0, 2), group)
    c.broadcast_(sent[:, ::2], group, source=1)
    return [reduced, sent, c.all_gather(base.transpose(0, 2), group, dim=1)]


def test_views_that_are_not_contiguous_are_changed_in_place_and_nothing_around_them(run):
    n = 2
    bases = [tensor_of(rank, 4, 3, 5) for rank in range(n)]
    for rank, (reduced, sent, gathered) in enumerate(run(n, non_contiguous_inputs, n)):
        expected = bases[rank].clone()
        expected[:, 1:2] = (bases[0] + bases[1])[:, 1:2]
        torch.testing.assert_close(reduced, expected, rtol=1e-15, atol=0)
        expected = bases[rank].clone()
        expected[:, ::2] = bases[1][:, ::2]
        assert torch.equal(sent, expected)
        assert torch.equal(gathered, torch.cat([b.transpose(0, 2) for b in bases], dim=1))


def random_sum(n: int) -> Tensor:
    group = tp_group(n)
    return c.all_reduce_(tensor_of(group.rank, 1001).float(), group)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_sum_has_the_same_bits_on_every_rank_and_in_a_rerun(run, n):
    sums = run(n, random_sum, n) + run(n, random_sum, n)
    assert all(torch.equal(sums[0], other) for other in sums)


def flat_operations(n: int, async_op: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    group = tp_group(n)
    own = slice(7 * group.rank, 7 * group.rank + 7)
    whole = tensor_of(group.rank, 7 * n)
    shard = torch.empty(7, dtype=whole.dtype)
    scattered = c.reduce_scatter_flat_(shard, whole, group, async_op=async_op)
    in_place = tensor_of(group.rank, 7 * n)
    scattered_in_place = c.reduce_scatter_flat_(in_place[own], in_place, group, async_op=async_op)
    gathered = torch.empty(7 * n, dtype=whole.dtype)
    scattered.wait()
    collected = c.all_gather_flat_(gathered, shard, group, async_op=async_op)
    scattered_in_place.wait()
    kept = torch.cat([in_place[: own.start], in_place[own.stop :]])
    collected_in_place = c.all_gather_flat_(in_place, in_place[own], group, async_op=async_op)
    for pending in (collected, collected_in_place, collected):  # a second wait is harmless
        pending.wait()
    return shard, gathered, in_place, kept


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize("n", SIZES)
def test_flat_operations_work_in_place_and_overlapped(run, n, async_op):
    inputs = [tensor_of(rank, 7 * n) for rank in range(n)]
    total = torch.stack(inputs).sum(0)
    for rank, (shard, gathered, in_place, kept) in enumerate(run(n, flat_operations, n, async_op)):
        own = slice(7 * rank, 7 * rank + 7)
        torch.testing.assert_close(shard, total[own], rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(gathered, total, rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(in_place, total, rtol=1e-14, atol=1e-15)
        assert torch.equal(kept, torch.cat([inputs[rank][: own.start], inputs[rank][own.stop :]]))


def passes_round(n: int) -> Tensor:
    group = Mesh.build(pp=n, timeout_seconds=20).decode
    mine = whole_numbers(group.rank, 4, 3)
    if group.is_first:
        c.send(mine.t(), group, 1)
        return c.receive_(torch.empty(3, 4, dtype=mine.dtype), group, n - 1)
    got = torch.empty(4, 3, dtype=mine.dtype).t()  # not contiguous
    c.receive_(got, group, group.rank - 1)
    c.send(got + mine.t(), group, (group.rank + 1) % n)
    return got


@pytest.mark.parametrize("n", [2, 3])
def test_send_and_receive_use_positions_in_the_group(run, n):
    received = run(n, passes_round, n)
    sums = torch.stack([whole_numbers(rank, 4, 3).t() for rank in range(n)]).cumsum(0)
    for rank in range(n):
        assert torch.equal(received[rank], sums[rank - 1])


def values_and_barrier(n: int) -> list:
    group = tp_group(n)
    c.barrier(group)
    return c.gather_values({"rank": group.rank, "text": "é" * group.rank, "none": None}, group)


@pytest.mark.parametrize("n", SIZES)
def test_host_values_of_different_lengths_arrive_in_group_order(run, n):
    expected = [{"rank": r, "text": "é" * r, "none": None} for r in range(n)]
    assert run(n, values_and_barrier, n) == [expected] * n


def traffic_of_everything(n: int) -> dict[str, tuple[int, int]]:
    group = tp_group(n)
    x = torch.ones(6 * n, 5)  # 120·n bytes
    c.all_gather(x, group)
    c.reduce_scatter(x, group)
    y = d.gather_sequence(x.requires_grad_(), group)
    y.sum().backward()
    c.all_gather_flat_(torch.empty(2 * n), torch.ones(2), group, async_op=True).wait()
    return {op: (k.calls, k.bytes) for (_, op), k in group.traffic.counts.items()}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_every_byte_is_counted_backward_included(run, n):
    x = 120 * n
    expected = {
        "all_gather": (3, 2 * (n - 1) * x + (n - 1) * 8),
        "reduce_scatter": (2, (n - 1) * x // n + (n - 1) * x),
    }
    assert run(n, traffic_of_everything, n) == [expected if n > 1 else {}] * n


def uneven(n: int, dtype: torch.dtype) -> tuple[bool, int]:
    """Rank a sends a + 2 b numbers to rank b; the first nothing to itself."""
    group = tp_group(n)

    def part(a: int, b: int) -> Tensor:
        return torch.arange(a + 2 * b, dtype=dtype) + 10 * a + b

    sizes = [a + 2 * group.rank for a in range(n)]
    found = all_to_all([part(group.rank, b) for b in range(n)], sizes, group)
    right = all(torch.equal(one, part(a, group.rank)) for a, one in enumerate(found))
    return right, group.traffic.bytes_on("tp")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_different_numbers_of_elements_go_between_every_two_ranks(run, n, dtype):
    for rank, (right, sent) in enumerate(run(n, uneven, n, dtype)):
        assert right
        assert sent == dtype.itemsize * sum(rank + 2 * b for b in range(n) if b != rank)


# Gradients. Every case says how one process computes the loss from all ranks' inputs.


def replicated(rank: int) -> int:
    """All ranks hold the same x, and the gradient belongs to that one x."""
    return 0


def own(rank: int) -> int:
    return rank


def part(x: Tensor, n: int, rank: int, dim: int) -> Tensor:
    return x.chunk(n, dim)[rank]


# name: (call, which input a rank holds, which weights its loss has, what it should see)
Seen = Callable[[list[Tensor], int, int], Tensor]
DIFFERENTIABLE: dict[str, tuple[Callable, Callable, Callable, Seen]] = {
    "copy_to_group": (d.copy_to_group, replicated, own, lambda xs, n, r: xs[0]),
    "reduce_from_group": (d.reduce_from_group, own, replicated, lambda xs, n, r: sum(xs)),
    "gather_from_group -1": (
        d.gather_from_group, own, replicated, lambda xs, n, r: torch.cat(xs, -1),
    ),
    "gather_from_group 1": (
        lambda x, g: d.gather_from_group(x, g, dim=1), own, replicated,
        lambda xs, n, r: torch.cat(xs, 1),
    ),
    "scatter_to_group -1": (
        d.scatter_to_group, replicated, own, lambda xs, n, r: part(xs[0], n, r, -1),
    ),
    "scatter_to_group 0": (
        lambda x, g: d.scatter_to_group(x, g, dim=0), replicated, own,
        lambda xs, n, r: part(xs[0], n, r, 0),
    ),
    "gather_sequence": (d.gather_sequence, own, own, lambda xs, n, r: torch.cat(xs, 0)),
    "scatter_sequence": (
        d.scatter_sequence, own, own, lambda xs, n, r: part(sum(xs), n, r, 0),
    ),
}  # fmt: skip


def loss_of(seen: Tensor, weights_of: int) -> Tensor:
    return (torch.sin(seen) * tensor_of(weights_of, *seen.shape, salt=1)).sum()


def value_and_gradient(name: str, n: int) -> tuple[Tensor, Tensor, bool]:
    call, holds, weighs, _ = DIFFERENTIABLE[name]
    group = tp_group(n)
    x = tensor_of(holds(group.rank), 2 * n, 3, 5 * n).requires_grad_()
    before = x.detach().clone()
    seen = call(x, group)
    loss_of(seen, weighs(group.rank)).backward()
    return seen.detach(), x.grad, torch.equal(x, before)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_values_and_gradients_equal_those_of_one_process(run, name, n):
    _, holds, weighs, see = DIFFERENTIABLE[name]
    xs = [tensor_of(rank, 2 * n, 3, 5 * n).requires_grad_() for rank in range(n)]
    seen = [see(xs, n, rank) for rank in range(n)]
    # A loss that every rank computes alike is one loss and counts once.
    counted = range(n) if weighs is own else [0]
    torch.stack([loss_of(seen[rank], weighs(rank)) for rank in counted]).sum().backward()
    for rank, (value, gradient, unchanged) in enumerate(run(n, value_and_gradient, name, n)):
        assert unchanged
        torch.testing.assert_close(value, seen[rank].detach(), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(gradient, xs[holds(rank)].grad, rtol=1e-13, atol=1e-13)


def block(x: Tensor, up: Tensor, down: Tensor, group: Group, sequence_parallel: bool) -> Tensor:
    enter, leave = (
        (d.gather_sequence, d.scatter_sequence)
        if sequence_parallel
        else (d.copy_to_group, d.reduce_from_group)
    )
    return leave(torch.tanh(enter(x, group) @ up) @ down, group)


def sharded_block(n: int, sequence_parallel: bool) -> list[Tensor]:
    group = tp_group(n)
    x, up, down = (tensor_of(0, *shape) for shape in ((2 * n, 3, 7), (7, 4 * n), (4 * n, 7)))
    if sequence_parallel:
        x = part(x, n, group.rank, 0)
    shards = [x, part(up, n, group.rank, 1), part(down, n, group.rank, 0)]
    shards = [s.clone().requires_grad_() for s in shards]
    y = block(*shards, group, sequence_parallel)
    weights = tensor_of(0, 2 * n, 3, 7, salt=1)
    (y * (part(weights, n, group.rank, 0) if sequence_parallel else weights)).sum().backward()
    return [s.grad for s in shards]


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("n", [2, 3])
def test_a_sharded_two_layer_block_has_the_gradients_of_the_whole_one(run, n, sequence_parallel):
    shapes = ((2 * n, 3, 7), (7, 4 * n), (4 * n, 7))
    whole = [tensor_of(0, *shape).requires_grad_() for shape in shapes]
    (block(*whole, Group.alone(), False) * tensor_of(0, 2 * n, 3, 7, salt=1)).sum().backward()
    for rank, (x, up, down) in enumerate(run(n, sharded_block, n, sequence_parallel)):
        expected_x = part(whole[0].grad, n, rank, 0) if sequence_parallel else whole[0].grad
        torch.testing.assert_close(x, expected_x, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(up, part(whole[1].grad, n, rank, 1), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(down, part(whole[2].grad, n, rank, 0), rtol=1e-12, atol=1e-13)


# Failures.

LIMIT_SECONDS = 2.0
FAILING: dict[str, Callable[[Group], object]] = {
    "all_reduce": lambda group: c.all_reduce_(torch.ones(3), group),
    "reduce_scatter": lambda group: c.reduce_scatter_flat_(
        torch.ones(2), torch.ones(6), group, async_op=True
    ).wait(),
    "receive": lambda group: c.receive_(torch.ones(3), group, source=1),
}


def meets_a_bad_peer(operation: str, peer: str) -> tuple | None:
    group = Mesh.build(dp=3, timeout_seconds=LIMIT_SECONDS).dp
    group.traffic.step = 17
    if group.rank == 1:
        if peer == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(LIMIT_SECONDS + 0.5)
        return None
    begin = time.monotonic()
    try:
        FAILING[operation](group)
    except c.CollectiveError as error:
        seconds = time.monotonic() - begin
        fields = (error.rank, error.axis, error.operation, error.step, error.timeout_seconds)
        return seconds, fields, str(error)
    return None


@pytest.mark.parametrize("operation", FAILING)
@pytest.mark.parametrize("peer", ["killed", "stuck"])
def test_a_bad_peer_is_an_error_on_the_others_within_the_limit(run, operation, peer):
    may_die = [1] if peer == "killed" else []
    results = run(3, meets_a_bad_peer, operation, peer, may_die=may_die)
    for rank in (0, 2):
        seconds, fields, message = results[rank]
        assert seconds < 1.75 * LIMIT_SECONDS  # the limit, and a busy machine
        assert fields == (rank, "dp", operation, 17, LIMIT_SECONDS)
        assert f"{operation} over dp failed on rank {rank} at step 17" in message
        assert "the group's ranks: 0, 1, 2; time limit 2 s" in message


WRONG_ARGUMENTS: dict[str, tuple[Callable[[Group], object], str]] = {
    "op": (lambda g: c.all_reduce_(torch.ones(2), g, "mean"), "op is 'mean'; allowed are sum"),
    "dim": (lambda g: c.all_gather(torch.ones(2, 3), g, dim=2), "dim is 2; a tensor of shape"),
    "divisible": (
        lambda g: c.reduce_scatter(torch.ones(3, 5), g), "dimension 0 of shape .3, 5. must be",
    ),
    "divisible slices": (lambda g: d.scatter_to_group(torch.ones(2, 5), g), "the 2 ranks of tp"),
    "divisible sequence": (lambda g: d.scatter_sequence(torch.ones(5, 2), g), "must be a multiple"),
    "source": (lambda g: c.broadcast_(torch.ones(2), g, source=2), "source is 2; .* 0 to 1"),
    "to itself": (lambda g: c.send(torch.ones(2), g, to=g.rank), "other than its own"),
    "length": (
        lambda g: c.all_gather_flat_(torch.ones(5), torch.ones(2), g), "output has 5 numbers",
    ),
    "dtype": (
        lambda g: c.reduce_scatter_flat_(torch.ones(2), torch.ones(4).double(), g), "torch.float64",
    ),
    "strides": (
        lambda g: c.all_gather_flat_(torch.ones(4, 2)[:, 0], torch.ones(2), g), "be contiguous",
    ),
}  # fmt: skip


def message_of(name: str) -> tuple[str, int]:
    mesh = Mesh.build(tp=2, timeout_seconds=20)
    with pytest.raises(ValueError) as error:
        WRONG_ARGUMENTS[name][0](mesh.tp)
    return str(error.value), len(mesh.traffic.counts)


@pytest.mark.parametrize("name", WRONG_ARGUMENTS)
def test_a_wrong_argument_is_refused_before_anything_is_sent(run, name):
    for message, operations_counted in run(2, message_of, name):
        assert re.search(WRONG_ARGUMENTS[name][1], message)
        assert operations_counted == 0


def backend_error() -> tuple[str, str]:
    mesh = Mesh.build(tp=2, timeout_seconds=20)
    with pytest.raises(c.CollectiveError) as error:
        c.all_reduce_(torch.ones(2, dtype=torch.int16), mesh.tp)
    return str(error.value), type(error.value.__cause__).__name__


def test_a_refusal_of_the_backend_is_named_like_a_failure(run):
    for rank, (message, cause) in enumerate(run(2, backend_error)):
        assert message.startswith(f"all_reduce over tp failed on rank {rank} at step 0")
        assert cause == "RuntimeError"
