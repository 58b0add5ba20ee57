"""The mesh: coordinates, groups, refusals, and counting."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.distributed as dist

from megarlx.comm.collectives import all_reduce_, broadcast_, receive_, send
from megarlx.comm.groups import CollectiveError, Group, Layout, Mesh, Traffic, bytes_sent
from megarlx.comm.launch import Launch, start, stop

# The coordinates that may vary inside each group, written independently of groups.py.
VARIES = {
    "pp": "p",
    "replica": "r",
    "dp": "d",
    "tp": "t",
    "world": "prdt",
    "model": "pt",
    "data": "rd",
    "objective": "pdt",
    "shards": "dt",
    "decode": "p",
}


def grid(pp: int, replica: int, dp: int, tp: int) -> list[dict[str, int]]:
    axes = itertools.product(range(pp), range(replica), range(dp), range(tp))
    return [dict(zip("prdt", place, strict=True)) for place in axes]


def expected_ranks(sizes: tuple[int, int, int, int], rank: int, name: str) -> list[int]:
    places = grid(*sizes)
    fixed = set("prdt") - set(VARIES[name])
    return [i for i, q in enumerate(places) if all(q[a] == places[rank][a] for a in fixed)]


def groups_and_sums(sizes: tuple[int, int, int, int]) -> dict[str, tuple[list[int], int, float]]:
    pp, replica, dp, tp = sizes
    mesh = Mesh.build(pp, replica, dp, tp, timeout_seconds=20)
    out = {}
    for name in (*VARIES, "embedding"):
        group: Group = getattr(mesh, name)
        total = all_reduce_(torch.tensor(2.0**mesh.rank, dtype=torch.float64), group).item()
        assert group.global_rank == mesh.rank == dist.get_rank()
        assert (group.process_group is None) == (group.size == 1)
        assert group.is_first == (mesh.rank == group.ranks[0])
        assert group.is_last == (mesh.rank == group.ranks[-1])
        out[name] = (list(group.ranks), group.rank, total)
    return out


@pytest.mark.parametrize(
    "sizes", [(2, 1, 2, 1), (1, 2, 1, 2), (1, 1, 3, 1), (1, 1, 1, 4), (4, 1, 1, 1), (3, 1, 1, 2)]
)
def test_each_group_joins_the_ranks_that_differ_only_along_its_axes(run, sizes):
    for rank, groups in enumerate(run(math.prod(sizes), groups_and_sums, sizes)):
        for name in VARIES:
            ranks = expected_ranks(sizes, rank, name)
            total = float(sum(2**r for r in ranks))
            assert groups[name] == (ranks, ranks.index(rank), total), (rank, name)


@pytest.mark.parametrize("sizes", [(4, 1, 1, 1), (2, 1, 2, 1), (3, 1, 1, 2), (1, 1, 2, 1)])
def test_the_embedding_group_joins_first_and_last_stage(run, sizes):
    places = grid(*sizes)
    for rank, groups in enumerate(run(math.prod(sizes), groups_and_sums, sizes)):
        mine = places[rank]
        ends = {0, sizes[0] - 1}
        joined = [i for i, q in enumerate(places) if {**q, "p": 0} == {**mine, "p": 0}]
        ranks = [i for i in joined if places[i]["p"] in ends] if mine["p"] in ends else [rank]
        assert groups["embedding"] == (ranks, ranks.index(rank), float(sum(2**r for r in ranks)))


def builds_without_rank_1() -> tuple[str, str] | None:
    if dist.get_rank() == 1:
        return None
    with pytest.raises(CollectiveError) as error:
        Mesh.build(dp=2, timeout_seconds=0.5)
    return error.value.operation, str(error.value)


def test_a_rank_that_does_not_come_to_the_mesh_is_an_error_within_the_limit(run):
    operation, message = run(2, builds_without_rank_1, time_limit=20)[0]
    assert operation == "new_group"
    assert "new_group over world failed on rank 0" in message
    assert "ranks: 0, 1; time limit 0.5 s" in message


def builds_two_meshes() -> tuple[bool, bool, float]:
    first, second = (Mesh.build(pp=3, timeout_seconds=10) for _ in range(2))
    total = all_reduce_(torch.ones(()), second.world).item()
    return (
        first.decode.process_group is not first.pp.process_group,
        first.pp.process_group is first.model.process_group is first.world.process_group,
        total,
    )


def test_decode_has_its_own_group_and_equal_groups_are_made_once_even_in_a_second_mesh(run):
    assert run(3, builds_two_meshes) == [(True, True, 3.0)] * 3


def test_a_mesh_of_one_needs_no_processes_and_sends_nothing():
    mesh = Mesh.alone()
    assert all(group.ranks == (0,) and group.process_group is None for group in mesh.groups)
    for group in (*mesh.groups, Group.alone("dp")):
        x = torch.ones(3)
        assert all_reduce_(x, group) is x
        assert broadcast_(x, group) is x
    assert mesh.traffic.counts == {}


@pytest.mark.parametrize(
    ("sizes", "world_size", "suggested"),
    [
        ((2, 1, 1, 2), 8, "pp=2 replica=1 dp=2 tp=2"),  # more processes: more dp
        ((1, 1, 8, 2), 12, "pp=1 replica=1 dp=6 tp=2"),
        ((1, 2, 4, 1), 4, "pp=1 replica=2 dp=2 tp=1"),  # objectives are kept
        ((4, 1, 1, 2), 7, "pp=7 replica=1 dp=1 tp=1"),
    ],
)
def test_a_wrong_world_size_is_refused_with_both_numbers_and_layouts_that_work(
    sizes, world_size, suggested
):
    layout = Layout(*sizes)
    with pytest.raises(ValueError, match=f"needs {layout.world_size} .* {world_size} are") as error:
        layout.check_world_size(world_size)
    assert f"Layouts for {world_size}: {suggested};" in str(error.value)  # the nearest first
    near = layout.nearest(world_size, count=99)
    assert all(one.world_size == world_size for one in near)
    # A run without replicas has no objectives to give some to.
    assert any(one.replica > 1 for one in near) is (layout.replica > 1)


def test_a_mesh_larger_than_the_job_is_refused_before_any_group_is_made():
    with pytest.raises(ValueError, match=r"dp=2 tp=2 needs 4 processes, but 1 is running"):
        Mesh.build(dp=2, tp=2)


@pytest.mark.parametrize("bad", [{"tp": 0}, {"dp": -1}, {"pp": 2.0}, {"replica": True}])
def test_a_size_that_is_no_positive_whole_number_is_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} is "):
        Mesh.build(**bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "mpi"}, "backend is 'mpi'; allowed are gloo, nccl, fake"),
        ({"backend": "nccl"}, "nccl needs a CUDA device, but device is 'cpu'"),
        ({"timeout_seconds": 0}, "timeout_seconds is 0"),
    ],
)
def test_an_impossible_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Mesh.build(**options)


def test_a_fake_mesh_of_1024_processes_is_built_in_one():
    start(Launch(rank=777, world_size=1024, local_world_size=8), backend="fake")
    try:
        mesh = Mesh.build(pp=4, replica=2, dp=16, tp=8, backend="fake")
    finally:
        stop()
    sizes = (4, 2, 16, 8)
    for name in VARIES:
        assert list(getattr(mesh, name).ranks) == expected_ranks(sizes, 777, name)
    assert mesh.layout.coordinates(777) == {"pp": 3, "replica": 0, "dp": 1, "tp": 1}


def test_coordinates_and_ranks_are_inverse_of_each_other():
    layout = Layout(2, 3, 4, 5)
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert [layout.rank_at(**place) for place in places] == list(range(120))
    assert [place["tp"] for place in places[:6]] == [0, 1, 2, 3, 4, 0]


@pytest.mark.parametrize(
    ("operation", "size", "sent"),
    [
        ("all_reduce", 4, 1200),  # 2·3/4·800
        ("all_gather", 4, 600),
        ("reduce_scatter", 2, 400),
        ("broadcast", 3, 800),
        ("send", 2, 800),
        ("receive", 2, 0),
        ("all_reduce", 1, 0),
    ],
)
def test_bytes_sent_follow_the_ring_formulas(operation, size, sent):
    assert bytes_sent(operation, size, 800) == sent


def test_an_unknown_operation_has_no_formula():
    with pytest.raises(ValueError, match="operation is 'scatter'"):
        bytes_sent("scatter", 2, 8)


def counts_of_a_few_calls() -> dict[tuple[str, str], tuple[int, int]]:
    mesh = Mesh.build(pp=2, tp=2, timeout_seconds=20)
    all_reduce_(torch.ones(10, dtype=torch.float64), mesh.tp)
    all_reduce_(torch.ones(6, dtype=torch.bfloat16), mesh.tp)
    broadcast_(torch.ones(5, dtype=torch.int64), mesh.world, source=3)
    if mesh.pp.is_first:
        send(torch.ones(7), mesh.pp, 1)
    else:
        receive_(torch.ones(7), mesh.pp, 0)
    assert mesh.traffic.bytes_on("tp") == 92
    return {key: (count.calls, count.bytes) for key, count in mesh.traffic.counts.items()}


def test_traffic_counts_calls_and_bytes_of_each_axis_and_operation(run):
    shared = {("tp", "all_reduce"): (2, 80 + 12), ("world", "broadcast"): (1, 40)}
    first, last = {("pp", "send"): (1, 28)}, {("pp", "receive"): (1, 0)}
    expected = [shared | first, shared | first, shared | last, shared | last]
    assert run(4, counts_of_a_few_calls) == expected


def test_traffic_can_be_reset_and_keeps_its_step():
    traffic = Traffic(step=3)
    traffic.add("tp", "send", 5)
    traffic.reset()
    assert traffic.counts == {}
    assert traffic.step == 3
