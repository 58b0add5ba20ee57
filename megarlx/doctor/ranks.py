"""The processes of a job, looked at from each of them: do they fit together and reach each other?

As everywhere in the doctor, what might crash or hang runs in a child with a time limit.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megarlx.doctor.findings import Finding
from megarlx.doctor.look import run

CHILD = Path(__file__).with_name("rank_child.py")
# Size of the job, rank, rank on the node; innermost launcher first, as in comm/launch.py.
LAUNCHERS = (
    ("WORLD_SIZE", "RANK", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
)
STARTING_SECONDS = 60.0  # to import torch, on a busy machine


@dataclass(frozen=True)
class Place:
    """Where in a job this process is."""

    ranks: int
    rank: int
    local_rank: int


def place_in_job(environment: Mapping[str, str] | None = None) -> Place | None:
    """None where no launcher started several processes."""
    known = os.environ if environment is None else environment
    for names in LAUNCHERS:
        values = [known.get(name, "") for name in names]
        if all(value.isdecimal() for value in values):
            place = Place(*map(int, values))
            return place if place.ranks > 1 else None
    return None


def check_ranks(place: Place, layout: str | None, time_limit_seconds: float) -> list[Finding]:
    """On rank 0 what all ranks found together; on the others only what kept them from it."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    words = [sys.executable, "-P", str(CHILD), str(time_limit_seconds), layout or ""]
    whole = 2 * time_limit_seconds + STARTING_SECONDS
    ended = run(words, whole, env={**os.environ, "PYTHONPATH": path})
    part = f"rank {place.rank}"
    if ended.hung:
        detail = f"did not get through its checks within {whole:g} seconds"
        return [Finding(part, "broken", detail, _which_network())]
    try:
        answer = json.loads(ended.out)
    except ValueError:
        said = ended.err.strip().splitlines()[-1:] or [f"ended with status {ended.status}"]
        return [Finding(part, "broken", said[0], _which_network())]
    return [Finding(**finding) for finding in answer]


def _which_network() -> str:
    return (
        "export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0   (the network between the nodes; "
        "look first at the rank whose output ends earliest)"
    )
