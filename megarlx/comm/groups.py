"""Who talks to whom: the mesh of processes, its groups, and the count of what they send.

A job's processes form a grid with the axes (pp, replica, dp, tp), tp varying fastest, so the ranks
of a tensor-parallel group sit on one node. `Mesh.build` is called once, after
`megarlx.comm.launch.start`; the mesh, or one of its groups, is then passed to whatever
communicates. Nothing here is kept in a module.

A new joint group is one more field of `Mesh` and one more line in `Mesh.build`; every rank must
make the same number of groups in the same order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

AXES = ("pp", "replica", "dp", "tp")


def bytes_sent(operation: str, group_size: int, tensor_bytes: int) -> int:
    """Bytes one rank sends in a ring algorithm, n = group_size.

    `tensor_bytes` is the size of the whole tensor: for all_gather the gathered result, for
    reduce_scatter the input.

        all_reduce                    2 (n-1)/n · bytes
        all_gather, reduce_scatter      (n-1)/n · bytes
        broadcast, send                           bytes   (a broadcast is passed on along the ring)
        receive                                       0

    The count is of the payload under this model, not of packets: a backend may choose another
    algorithm. A fraction of a byte is dropped.
    """
    n = group_size
    if n == 1 or operation == "receive":
        return 0
    if operation == "all_reduce":
        return 2 * (n - 1) * tensor_bytes // n
    if operation in ("all_gather", "reduce_scatter"):
        return (n - 1) * tensor_bytes // n
    if operation in ("broadcast", "send"):
        return tensor_bytes
    raise ValueError(
        f"bytes_sent: operation is '{operation}'; allowed are all_reduce, all_gather, "
        "reduce_scatter, broadcast, send, receive"
    )


@dataclass
class Count:
    calls: int = 0
    bytes: int = 0


@dataclass
class Traffic:
    """Calls made and bytes sent by this rank, per (axis, operation), and the step they belong to.

    One object is shared by all groups of a mesh. The trainer writes `step`; errors name it.
    """

    step: int = 0
    counts: dict[tuple[str, str], Count] = field(default_factory=dict)

    def add(self, axis: str, operation: str, sent: int) -> None:
        count = self.counts.setdefault((axis, operation), Count())
        count.calls += 1
        count.bytes += sent

    def bytes_on(self, axis: str) -> int:
        return sum(count.bytes for (a, _), count in self.counts.items() if a == axis)

    def reset(self) -> None:
        self.counts.clear()


@dataclass(frozen=True)
class Group:
    """Ranks that communicate, seen from one of them."""

    axis: str  # "tp", "dp", "pp", "replica" or the name of a joint group
    ranks: tuple[int, ...]  # global ranks in group order
    rank: int  # this process's position in `ranks`
    process_group: dist.ProcessGroup | None  # None for a group of one: nothing is ever sent
    traffic: Traffic  # shared by all groups of a mesh
    timeout_seconds: float

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def global_rank(self) -> int:
        return self.ranks[self.rank]

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1

    @staticmethod
    def alone(axis: str = "tp") -> Group:
        return _group_of_one(axis, 0, Traffic())


class CollectiveError(RuntimeError):
    """An operation between processes failed: which one, where, at which step, and why."""

    def __init__(self, group: Group, operation: str, cause: Exception) -> None:
        self.rank = group.global_rank
        self.axis = group.axis
        self.operation = operation
        self.step = group.traffic.step
        self.timeout_seconds = group.timeout_seconds
        members = ", ".join(map(str, group.ranks[:16])) + (", …" if group.size > 16 else "")
        super().__init__(
            f"{operation} over {self.axis} failed on rank {self.rank} at step {self.step} "
            f"(the group's ranks: {members}; time limit {self.timeout_seconds:g} s): {cause}. "
            "Look first at the rank whose log ends earliest: a peer that died or is stuck "
            "makes the others fail like this."
        )


def _group_of_one(axis: str, rank: int, traffic: Traffic) -> Group:
    return Group(axis, (rank,), 0, None, traffic, math.inf)


@dataclass(frozen=True)
class Layout:
    """The sizes of the axes, and the arithmetic between a global rank and its coordinates."""

    pp: int = 1
    replica: int = 1
    dp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            size = getattr(self, axis)
            if type(size) is not int or size < 1:
                raise ValueError(
                    f"mesh: {axis} is {size!r}; it must be a whole number of 1 or more"
                )

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return (self.pp, self.replica, self.dp, self.tp)

    @property
    def world_size(self) -> int:
        return math.prod(self.sizes)

    def coordinates(self, rank: int) -> dict[str, int]:
        place = {}
        for axis, size in zip(reversed(AXES), reversed(self.sizes), strict=True):
            rank, place[axis] = divmod(rank, size)
        return place

    def rank_at(self, **coordinates: int) -> int:
        rank = 0
        for axis, size in zip(AXES, self.sizes, strict=True):
            rank = rank * size + coordinates[axis]
        return rank

    def ranks_along(self, axes: tuple[str, ...], rank: int) -> tuple[int, ...]:
        """The ranks that differ from `rank` in nothing but `axes`, in mesh order."""
        here = self.coordinates(rank)
        choices = [
            range(size) if axis in axes else (here[axis],)
            for axis, size in zip(AXES, self.sizes, strict=True)
        ]
        return tuple(
            self.rank_at(**dict(zip(AXES, place, strict=True)))
            for place in itertools.product(*choices)
        )

    def embedding_ranks(self, rank: int) -> tuple[int, ...]:
        """First and last stage of this rank's pipeline; a stage between them is alone."""
        stages = self.ranks_along(("pp",), rank)
        ends = (stages[0], stages[-1]) if len(stages) > 1 else stages
        return ends if rank in ends else (rank,)

    def check_world_size(self, world_size: int) -> None:
        if self.world_size == world_size:
            return
        near = "; ".join(str(layout) for layout in self.nearest(world_size))
        raise ValueError(
            f"mesh: {self} needs {self.world_size} processes, but {world_size} "
            f"{'is' if world_size == 1 else 'are'} running. Layouts for {world_size}: {near}"
        )

    def nearest(self, world_size: int, count: int = 3) -> list[Layout]:
        """The layouts of `world_size` processes that change least; dp is changed most readily.

        `replica` is one for each objective, so it is not for us to change unless nothing else fits;
        a run without replicas is not offered any.
        """

        def distance(layout: Layout) -> float:
            steps = [abs(math.log2(a / b)) for a, b in zip(layout.sizes, self.sizes, strict=True)]
            return steps[0] + 100 * steps[1] + 0.5 * steps[2] + 2 * steps[3]

        layouts = (Layout(*sizes) for sizes in _factorings(world_size, 4))
        allowed = (one for one in layouts if one.replica == 1 or self.replica > 1)
        return sorted(allowed, key=distance)[:count]

    def __str__(self) -> str:
        return " ".join(f"{axis}={size}" for axis, size in zip(AXES, self.sizes, strict=True))


def _factorings(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (number,)
        return
    for divisor in range(1, number + 1):
        if number % divisor == 0:
            for rest in _factorings(number // divisor, parts - 1):
                yield (divisor, *rest)


@dataclass(frozen=True)
class Mesh:
    """Every group this process belongs to."""

    layout: Layout
    rank: int  # global
    traffic: Traffic
    pp: Group
    replica: Group
    dp: Group
    tp: Group
    world: Group
    model: Group  # pp+tp: one copy of the model's weights
    data: Group  # replica+dp: the same weights, other data
    objective: Group  # pp+dp+tp: all ranks of this replica, which run one objective
    shards: Group  # dp+tp: together one copy of the optimizer state of a pipeline rank
    decode: Group  # the ranks of pp, on a group of its own for the point-to-point of generation
    embedding: Group  # first and last pipeline stage (tied weights); alone in a stage between

    @property
    def groups(self) -> tuple[Group, ...]:
        return (
            *(self.pp, self.replica, self.dp, self.tp, self.world),
            *(self.model, self.data, self.objective, self.shards, self.decode, self.embedding),
        )

    @staticmethod
    def alone() -> Mesh:
        return Mesh.build()

    @staticmethod
    def build(
        pp: int = 1,
        replica: int = 1,
        dp: int = 1,
        tp: int = 1,
        *,
        timeout_seconds: float = 600.0,
        backend: str | None = None,
        device: str | torch.device = "cpu",
    ) -> Mesh:
        """Makes the groups of a layout over the processes that `launch.start` brought together.

        `backend` is by default NCCL for a CUDA device (with gloo beside it for CPU tensors) and
        gloo otherwise; "fake" is for planning a layout of any size in one process.
        """
        layout = Layout(pp, replica, dp, tp)
        rank, world_size = (
            (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        )
        if timeout_seconds <= 0:
            raise ValueError(f"mesh: timeout_seconds is {timeout_seconds}; it must be positive")
        layout.check_world_size(world_size)
        maker = _GroupMaker(rank, Traffic(), timeout_seconds, backend, torch.device(device))

        def along(*axes: str, name: str | None = None, shared: bool = True) -> Group:
            ranks = layout.ranks_along(axes, rank)
            return maker.make(name or "+".join(axes), ranks, shared=shared)

        return Mesh(
            layout=layout,
            rank=rank,
            traffic=maker.traffic,
            world=along(*AXES, name="world"),
            tp=along("tp"),
            dp=along("dp"),
            replica=along("replica"),
            pp=along("pp"),
            model=along("pp", "tp"),
            data=along("replica", "dp", name=None if replica > 1 else "dp"),
            objective=along("pp", "dp", "tp"),
            shards=along("dp", "tp"),
            decode=along("pp", name="decode", shared=False),
            embedding=maker.make_embedding(layout),
        )


class _GroupMaker:
    """Makes process groups so that every rank makes the same ones in the same order.

    Only a group's members take part in making it, so a job of a thousand ranks makes eleven groups
    a rank and not thousands. torch then names a group by its ranks and the number of groups made
    before it: that number must agree between the members, so nothing here may depend on a rank's
    place but the ranks themselves. No cycle of waiting can arise: a group is waited for only by
    ranks that have finished all groups before it.
    """

    def __init__(
        self,
        rank: int,
        traffic: Traffic,
        timeout_seconds: float,
        backend: str | None,
        device: torch.device,
    ) -> None:
        self.rank = rank
        self.traffic = traffic
        self.timeout_seconds = timeout_seconds
        self.backend = backend_for(device, backend)
        # Binding NCCL groups to the device makes their communicators here, in this order, and not
        # at first use, where two pipeline stages can wait for each other.
        self.device = device if device.type == "cuda" and "nccl" in self.backend else None
        self.made: dict[tuple[int, ...], dist.ProcessGroup | None] = {}

    def make(self, axis: str, ranks: tuple[int, ...], *, shared: bool = True) -> Group:
        if not shared or ranks not in self.made:
            alone = len(ranks) == 1
            self.made[ranks] = None if alone else self._new_process_group(axis, ranks)
        process_group = self.made[ranks]
        if process_group is None:
            return _group_of_one(axis, self.rank, self.traffic)
        position = ranks.index(self.rank)
        return Group(axis, ranks, position, process_group, self.traffic, self.timeout_seconds)

    def make_embedding(self, layout: Layout) -> Group:
        ranks = layout.embedding_ranks(self.rank)
        if layout.pp > 2 and len(ranks) == 1:
            # A stage between: a group of itself that is never used keeps the numbers equal.
            self._new_process_group("embedding", ranks)
            return _group_of_one("embedding", self.rank, self.traffic)
        return self.make("embedding", ranks)

    def _new_process_group(self, axis: str, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        try:
            return dist.new_group(
                list(ranks),
                timeout=timedelta(seconds=self.timeout_seconds),
                backend=self.backend,
                use_local_synchronization=True,
                group_desc=axis,
                device_id=self.device,
            )
        except RuntimeError as error:  # every c10d error is one
            place = ranks.index(self.rank)
            group = Group(axis, ranks, place, None, self.traffic, self.timeout_seconds)
            raise CollectiveError(group, "new_group", error) from error


def backend_for(device: str | torch.device, backend: str | None) -> str:
    """NCCL never stands alone: small host-side values (counts, digests, texts) go over gloo."""
    if backend is None:
        backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
    allowed = ("gloo", "nccl", "fake")
    if backend not in allowed:
        raise ValueError(f"mesh: backend is '{backend}'; allowed are {', '.join(allowed)}")
    if backend == "nccl" and torch.device(device).type != "cuda":
        raise ValueError(f"mesh: backend nccl needs a CUDA device, but device is '{device}'")
    if backend == "fake" and torch.device(device).type == "meta":
        return "cpu:fake,meta:fake"  # torch registers it for devices that hold data
    return "cpu:gloo,cuda:nccl" if backend == "nccl" else backend
