"""How this process was started: torchrun, Slurm and MPI environments read into one `Launch`.

`read()` looks at the environment only; `start` then brings the processes together and `stop` lets
them go. A program run by hand, without any of the launchers, is a job of one process. mpi4py is
imported only where it is asked for.
"""

from __future__ import annotations

import os
import re
import socket
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megarlx import processes
from megarlx.comm import meeting
from megarlx.comm.groups import backend_for

DEFAULT_PORT = 29500
ROLL_CALL_SECONDS = 5.0
# Where the processes met: the process has one such place, as torch has one default group.
_place: list[dist.Store] = []


class EveryRankWarning(UserWarning):
    """What every rank finds alike; the first alone says it."""


class LaunchError(RuntimeError):
    """The environment of a launcher is incomplete or contradicts itself, or a peer is missing."""


@dataclass(frozen=True)
class Launch:
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    master_address: str = "127.0.0.1"
    master_port: int = DEFAULT_PORT
    launcher: str = "none"

    def __post_init__(self) -> None:
        for rank, size in (("rank", "world_size"), ("local_rank", "local_world_size")):
            if not 0 <= getattr(self, rank) < getattr(self, size):
                raise LaunchError(
                    f"{self.launcher}: {rank} is {getattr(self, rank)}, but {size} is "
                    f"{getattr(self, size)}; {rank} must be from 0 to {size} - 1"
                )
        if self.local_world_size > self.world_size:
            raise LaunchError(
                f"{self.launcher}: local_world_size is {self.local_world_size}, more than the "
                f"world_size of {self.world_size}"
            )
        if not 0 < self.master_port < 65536:
            raise LaunchError(
                f"{self.launcher}: master_port is {self.master_port}; allowed are 1 to 65535"
            )


def read(environment: Mapping[str, str] | None = None, launcher: str | None = None) -> Launch:
    """The launch that the environment describes, or that `launcher` names.

    Where several launchers left their marks the innermost counts: torchrun runs inside Slurm or
    MPI jobs, mpirun inside Slurm jobs.
    """
    env = _Environment(os.environ if environment is None else environment)
    if launcher is None:
        launcher = next((name for name, mark in _MARKS.items() if env.has_any(*mark)), "none")
    if launcher not in _READERS:
        raise LaunchError(f"launcher is '{launcher}'; allowed are {', '.join(_READERS)}")
    return _READERS[launcher](env)


class _Environment:
    """Environment variables, with errors that name what is missing or malformed."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self.values = values

    def has_any(self, *names: str) -> bool:
        return any(name in self.values for name in names)

    def require(self, launcher: str, *names: str) -> None:
        missing = [name for name in names if name not in self.values]
        if missing:
            found = [name for name in names if name in self.values]
            raise LaunchError(
                f"the environment looks like {launcher}'s, but {', '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not set (found: "
                f"{', '.join(f'{n}={self.values[n]}' for n in found) or 'none of the others'}). "
                "Start through the launcher, or unset what is left over from one."
            )

    def text(self, name: str) -> str:
        return self.values[name]

    def number(self, name: str) -> int:
        value = self.values[name]
        if re.fullmatch(r"\d+", value.strip()) is None:
            raise LaunchError(f"{name} is '{value}'; it must be a whole number")
        return int(value)

    def port(self, default: int) -> int:
        return self.number("MASTER_PORT") if "MASTER_PORT" in self.values else default


def _read_none(env: _Environment) -> Launch:
    return Launch()


def _read_torchrun(env: _Environment) -> Launch:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env.require("torchrun", *names)
    return Launch(
        rank=env.number("RANK"),
        local_rank=env.number("LOCAL_RANK"),
        world_size=env.number("WORLD_SIZE"),
        local_world_size=env.number("LOCAL_WORLD_SIZE"),
        master_address=env.text("MASTER_ADDR"),
        master_port=env.number("MASTER_PORT"),
        launcher="torchrun",
    )


def _read_slurm(env: _Environment) -> Launch:
    names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS")
    env.require("srun", *names, "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST")
    per_node = tasks_per_node(env.text("SLURM_STEP_TASKS_PER_NODE"))
    node = env.number("SLURM_NODEID")
    if node >= len(per_node):
        raise LaunchError(
            f"SLURM_NODEID is {node}, but SLURM_STEP_TASKS_PER_NODE "
            f"'{env.text('SLURM_STEP_TASKS_PER_NODE')}' describes {len(per_node)} nodes"
        )
    # Two jobs on a node must not meet at one port.
    job = env.number("SLURM_JOB_ID") if env.has_any("SLURM_JOB_ID") else 0
    first = env.values.get("MASTER_ADDR") or first_host(env.text("SLURM_STEP_NODELIST"))
    return Launch(
        rank=env.number("SLURM_PROCID"),
        local_rank=env.number("SLURM_LOCALID"),
        world_size=env.number("SLURM_STEP_NUM_TASKS"),
        local_world_size=per_node[node],
        master_address=first,
        master_port=env.port(20000 + job % 10000),
        launcher="slurm",
    )


def first_host(node_list: str) -> str:
    """`gpu[003-005,9],big1` → `gpu003`: Slurm's rank 0 runs on the first node of the list."""
    host = re.match(r"(?:[^,\[\]]|\[[^\]]*\])+", node_list)
    name = re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", host.group()) if host else ""
    if re.fullmatch(r"[\w.-]+", name) is None:
        raise LaunchError(f"SLURM_STEP_NODELIST is '{node_list}': no host name can be read from it")
    return name


def tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` → [2, 2, 2, 1]"""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise LaunchError(
                f"SLURM_STEP_TASKS_PER_NODE is '{text}'; expected a form like '2(x3),1'"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _read_openmpi(env: _Environment) -> Launch:
    return _read_mpi(
        env,
        "openmpi",
        rank="OMPI_COMM_WORLD_RANK",
        world_size="OMPI_COMM_WORLD_SIZE",
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
        local_world_size="OMPI_COMM_WORLD_LOCAL_SIZE",
    )


def _read_pmi(env: _Environment) -> Launch:
    return _read_mpi(
        env,
        "pmi",
        rank="PMI_RANK",
        world_size="PMI_SIZE",
        local_rank="MPI_LOCALRANKID",
        local_world_size="MPI_LOCALNRANKS",
    )


def _read_mpi(env: _Environment, launcher: str, **variables: str) -> Launch:
    env.require(launcher, *variables.values())
    numbers = {name: env.number(variable) for name, variable in variables.items()}
    address = env.values.get("MASTER_ADDR")
    if address is None and numbers["world_size"] > numbers["local_world_size"]:
        raise LaunchError(
            f"{launcher}: the {numbers['world_size']} processes are on several nodes, and MPI's "
            "environment does not say which holds rank 0. Pass MASTER_ADDR (mpirun -x "
            "MASTER_ADDR=host), or ask for launcher 'mpi4py', which finds it."
        )
    return Launch(
        **numbers,
        master_address=address or "127.0.0.1",
        master_port=env.port(DEFAULT_PORT),
        launcher=launcher,
    )


def _read_mpi4py(env: _Environment) -> Launch:
    """Asks MPI itself: rank 0 names its host and a free port to the others."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise LaunchError(
            f"launcher 'mpi4py' was asked for, but mpi4py does not import ({error}). "
            "Install it: pip install 'mpi4py>=4'"
        ) from error
    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    try:
        several_nodes = world.allreduce(node.size, MPI.MIN) < world.size
        here = env.values.get("MASTER_ADDR")
        if here is None:
            here = socket.gethostname() if several_nodes else "127.0.0.1"
        port = env.port(_free_port()) if world.rank == 0 else None
        address, port = world.bcast((here, port), root=0)
        return Launch(world.rank, node.rank, world.size, node.size, address, port, "mpi4py")
    finally:
        node.Free()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


_READERS = {
    "none": _read_none,
    "torchrun": _read_torchrun,
    "openmpi": _read_openmpi,
    "slurm": _read_slurm,
    "pmi": _read_pmi,
    "mpi4py": _read_mpi4py,
}
# What betrays a launcher, innermost first. Slurm sets SLURM_PROCID in a batch script too, which
# is one process whatever the job's size; only srun sets SLURM_STEP_NUM_TASKS. And srun may set
# PMI_RANK, so that comes last.
_MARKS = {
    "torchrun": ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "slurm": ("SLURM_STEP_NUM_TASKS",),
    "pmi": ("PMI_RANK", "PMI_SIZE"),
}


def start(
    launch: Launch,
    device: str | torch.device = "cpu",
    timeout_seconds: float = 600.0,
    backend: str | None = None,
) -> None:
    """Brings the processes together; a job of one process needs nothing.

    Under CUDA each process takes the GPU of its local rank. `backend` as in `Mesh.build`.
    """
    if torch.device(device).type == "cuda":
        if launch.local_rank >= torch.cuda.device_count():
            raise LaunchError(
                f"{launch.launcher}: local rank {launch.local_rank} of {launch.local_world_size} "
                f"has no GPU: {torch.cuda.device_count()} visible on this node"
            )
        torch.cuda.set_device(launch.local_rank)
    if launch.launcher == "torchrun":
        processes.die_with_parent()  # also where a program of one's own calls this
    if launch.rank:
        warnings.simplefilter("ignore", EveryRankWarning)
    if launch.world_size == 1:
        return
    limit = timedelta(seconds=timeout_seconds)
    backend = backend_for(device, backend)
    if backend == "fake":
        start_fake(launch.rank, launch.world_size)
        return
    try:
        _place[:] = [_meeting_place(launch, limit)]
        dist.init_process_group(
            backend,
            store=_place[0],
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=limit,
        )
    except RuntimeError as error:  # every c10d error is one
        raise LaunchError(
            f"{launch.launcher}: rank {launch.rank} of {launch.world_size} could not meet the "
            f"others at {launch.master_address}:{launch.master_port} within {timeout_seconds:g} s: "
            f"{error}"
        ) from error


def start_fake(rank: int, world_size: int) -> None:
    """Process groups in which nobody else is there: every operation is answered with nothing."""
    # Importing it is what makes torch know the backend.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)


def _meeting_place(launch: Launch, limit: timedelta) -> dist.Store:
    place = launch.master_address, launch.master_port
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return meeting.connect(*place, launch.rank, launch.world_size, limit)
    is_host = launch.rank == 0
    return dist.TCPStore(*place, launch.world_size, is_host, timeout=limit, multi_tenant=True)


def silent_ranks(launch: Launch, said: str) -> str:
    """After a failure among the processes: who does not say that it failed too, in a sentence."""
    if not _place or launch.world_size == 1:
        return ""
    _place[0].set_timeout(timedelta(seconds=ROLL_CALL_SECONDS))
    try:
        silent = meeting.roll_call(
            _place[0], launch.rank, launch.world_size, said, ROLL_CALL_SECONDS
        )
    except RuntimeError as error:  # the store is gone, and with it the process that held it
        return f"who else failed cannot be asked: {error}"
    if not silent:
        return f"all {launch.world_size} ranks failed in the same seconds"
    names = ", ".join(map(str, silent[:8])) + (", …" if len(silent) > 8 else "")
    return (
        f"of {launch.world_size} ranks, {names} did not say within {ROLL_CALL_SECONDS:g} s that "
        "they failed: look there first, they hang or have ended"
    )


def stop() -> None:
    """Ends the communication of this process; harmless where there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()
    _place.clear()
