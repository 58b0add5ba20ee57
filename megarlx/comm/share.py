"""How the ranks of a tool share work through a folder that all of them see."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """Which part of the pieces this rank makes, and how all ranks wait for each other at the start.

    Later on nobody waits for a message: rank 0 sees in the folder what is finished, and a rank
    that fails ends the job through its launcher (mpirun, srun and torchrun all do that).
    """

    rank: int = 0
    ranks: int = 1
    meet: Callable[[], None] = lambda: None

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def share_of_this_process() -> tuple[Share, int, Callable[[], None]]:
    """This rank's share, the ranks on this node, and what ends the communication."""
    # torch comes along with these; a process that only makes pieces does without.
    import torch

    from megarlx.comm import launch
    from megarlx.comm.collectives import all_reduce_
    from megarlx.comm.groups import Mesh

    here = launch.read()
    if here.world_size == 1:
        return Share(), 1, lambda: None
    if here.launcher in ("openmpi", "pmi") and importlib.util.find_spec("mpi4py"):
        here = launch.read(launcher="mpi4py")  # finds the first host and a free port by itself
    launch.start(here)
    world = Mesh.build(dp=here.world_size).world
    share = Share(here.rank, here.world_size, lambda: void(all_reduce_(torch.zeros(1), world)))
    return share, here.local_world_size, launch.stop


def void(_: object) -> None:
    """The value is not wanted, only that it arrived."""
