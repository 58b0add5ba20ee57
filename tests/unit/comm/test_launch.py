"""Environments of torchrun, Slurm and MPI, whole and half-set, and real launchers where there are.

The values are those the launchers set.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megarlx.comm.launch import (
    DEFAULT_PORT,
    Launch,
    LaunchError,
    first_host,
    read,
    start,
    stop,
    tasks_per_node,
)

ROOT = Path(__file__).resolve().parents[3]
MPIRUN = shutil.which("mpirun") or shutil.which("mpirun", path=Path(sys.executable).parent)
TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29401",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "7",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "gpu[003-005,9]",
    "SLURM_JOB_ID": "1234567",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch()),
        (TORCHRUN, Launch(5, 1, 8, 4, "node0", 29401, "torchrun")),
        (SLURM, Launch(5, 1, 7, 2, "gpu003", 24567, "slurm")),
        (OPENMPI, Launch(3, 3, 4, 4, "127.0.0.1", DEFAULT_PORT, "openmpi")),
        (PMI, Launch(1, 1, 2, 2, "127.0.0.1", DEFAULT_PORT, "pmi")),
    ],
    ids=["none", "torchrun", "slurm", "openmpi", "pmi"],
)
def test_each_launcher_is_recognised(environment, expected):
    assert read({"PATH": "/bin", **environment}) == expected


def test_the_innermost_launcher_counts():
    assert read({**SLURM, **TORCHRUN}).launcher == "torchrun"
    assert read({**OPENMPI, **TORCHRUN}).launcher == "torchrun"
    assert read({**SLURM, **OPENMPI}).launcher == "openmpi"
    assert read({**SLURM, **PMI}).launcher == "slurm"
    assert read({**SLURM, **TORCHRUN}, launcher="slurm").launcher == "slurm"
    assert read(TORCHRUN, launcher="none") == Launch()


def test_a_slurm_batch_script_without_srun_is_one_process():
    batch = {k: v for k, v in SLURM.items() if not k.startswith("SLURM_STEP")}
    assert read(batch) == Launch()


def test_an_address_of_cluster_defaults_alone_is_no_launcher():
    assert read({"MASTER_ADDR": "somewhere", "MASTER_PORT": "1"}) == Launch()


@pytest.mark.parametrize("environment", [SLURM, OPENMPI, PMI], ids=["slurm", "openmpi", "pmi"])
def test_address_and_port_can_be_given(environment):
    launch = read({**environment, "MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    assert (launch.master_address, launch.master_port) == ("head", 1234)


@pytest.mark.parametrize("missing", TORCHRUN)
def test_a_half_set_torchrun_environment_names_what_is_missing(missing):
    with pytest.raises(LaunchError, match=f"like torchrun's, but {missing} is not set"):
        read({k: v for k, v in TORCHRUN.items() if k != missing})


@pytest.mark.parametrize(
    ("environment", "missing"),
    [
        (SLURM, "SLURM_PROCID"),
        (SLURM, "SLURM_STEP_NODELIST"),
        (OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE"),
        (PMI, "MPI_LOCALRANKID"),
    ],
)
def test_half_set_environments_of_other_launchers_too(environment, missing):
    with pytest.raises(LaunchError, match=f"{missing} is not set"):
        read({k: v for k, v in environment.items() if k != missing})


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({**TORCHRUN, "RANK": "x"}, "RANK is 'x'; it must be a whole number"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK is '-1'"),
        ({**TORCHRUN, "RANK": "8"}, "rank is 8, but world_size is 8"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "local_rank is 4, but local_world_size is 4"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "9"}, "local_world_size is 9, more than"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "master_port is 70000"),
        ({**SLURM, "SLURM_NODEID": "4"}, "SLURM_NODEID is 4, .* describes 4 nodes"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "two"}, "TASKS_PER_NODE is 'two'"),
        ({**SLURM, "SLURM_STEP_NODELIST": "[,"}, "no host name can be read"),
        ({**OPENMPI, "OMPI_COMM_WORLD_SIZE": "8"}, "on several nodes.* MASTER_ADDR"),
    ],
)
def test_contradictions_are_named_with_their_values(environment, message):
    with pytest.raises(LaunchError, match=message):
        read(environment)


def test_an_unknown_launcher_is_refused():
    with pytest.raises(LaunchError, match="launcher is 'yarn'; allowed are none, torchrun"):
        read({}, launcher="yarn")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[003-005,9],big1", "gpu003"),
        ("gpu[9,3-5]", "gpu9"),
        ("rack[1-2]-node[08-10].local,x", "rack1-node08.local"),
    ],
)
def test_the_first_host_of_a_slurm_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("text", "counts"), [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,3(x2)", [1, 3, 3])]
)
def test_slurm_tasks_per_node(text, counts):
    assert tasks_per_node(text) == counts


def test_a_launch_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        Launch().rank = 1  # type: ignore[misc]


def test_one_process_starts_and_stops_without_torch_distributed():
    start(Launch())
    assert not dist.is_initialized()
    stop()


def test_a_missing_peer_is_an_error_within_the_limit():
    lonely = Launch(rank=0, world_size=2, local_world_size=2, master_port=free_port())
    with pytest.raises(LaunchError, match=r"rank 0 of 2 could not meet .*within 0.5 s"):
        start(lonely, timeout_seconds=0.5)
    assert not dist.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_local_rank_without_a_gpu_is_refused():
    with pytest.raises(LaunchError, match="local rank 0 of 1 has no GPU: 0 visible"):
        start(Launch(), device="cuda")


def test_mpi4py_is_asked_for_by_name_only():
    code = (
        "import sys, megarlx.comm.launch as l; l.read(); "
        "sys.exit('mpi4py' in sys.modules or 'fake_pg' in str(list(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_missing_mpi4py_is_named_with_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(LaunchError, match="pip install 'mpi4py>=4'"):
        read({}, launcher="mpi4py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# One write a line: `print` makes two of it where Python does not buffer, and ranks share the pipe.
PROGRAM = """
import json, os, sys, torch
from megarlx.comm import launch as l
from megarlx.comm.collectives import gather_values
from megarlx.comm.groups import Mesh
launch = l.read(launcher=sys.argv[1] if len(sys.argv) > 1 else None)
l.start(launch, timeout_seconds=60)
mesh = Mesh.build(dp=2, timeout_seconds=60)
ranks = gather_values([launch.rank, launch.local_rank, launch.launcher], mesh.dp)
if launch.rank == 0:
    os.write(1, b"RANKS " + json.dumps(ranks).encode() + b"\\n")
l.stop()
"""


def ranks_printed(command: list[str], program: Path, *arguments: str) -> list:
    program.write_text(PROGRAM)
    done = subprocess.run(
        [*command, str(program), *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("RANKS", 1)[1].splitlines()[0])


def test_two_processes_of_a_real_torchrun_meet(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ranks = ranks_printed(command, tmp_path / "program.py")
    assert ranks == [[0, 0, "torchrun"], [1, 1, "torchrun"]]


KILLED_ONCE = """
import os, signal
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    import megarlx.comm.launch as first
    first.start(first.read(), timeout_seconds=20)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()
"""


@pytest.mark.parametrize("meeting", ["standalone", "static"])
def test_a_rank_killed_under_torchrun_meets_the_others_again(tmp_path, monkeypatch, meeting):
    """The launcher's store still holds the addresses of the first start."""
    monkeypatch.setattr(sys.modules[__name__], "PROGRAM", KILLED_ONCE + PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--max-restarts=1", "--monitor-interval=0.1"]
    command += ["--standalone"] if meeting == "standalone" else [f"--master-port={free_port()}"]
    ranks = ranks_printed(command, tmp_path / "program.py")
    assert ranks == [[0, 0, "torchrun"], [1, 1, "torchrun"]]


@pytest.mark.skipif(sys.platform != "linux", reason="parents' deaths are told by Linux only")
def test_workers_end_when_their_torchrun_is_killed(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        f"import signal\n{PROGRAM}os.write(1, b'%d\\n' % os.getpid())\nsignal.pause()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, str(program)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    workers = [int(line) for line in lines if not line.startswith("RANKS")]
    assert len(workers) == 2
    process.kill()
    process.wait()
    # They hold the other end of the pipe: it closes when the last of them has ended.
    assert process.stdout.read() == ""
    process.stdout.close()


@pytest.mark.skipif(
    MPIRUN is None or importlib.util.find_spec("mpi4py") is None,
    reason="no mpirun or no mpi4py here",
)
@pytest.mark.parametrize("launcher", ["openmpi", "mpi4py"])
def test_two_processes_of_a_real_mpirun_meet(tmp_path, launcher, monkeypatch):
    if launcher == "openmpi":  # mpi4py finds a free port itself
        monkeypatch.setenv("MASTER_PORT", str(free_port()))
    command = [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable]
    ranks = ranks_printed(command, tmp_path / "program.py", launcher)
    assert ranks == [[0, 0, launcher], [1, 1, launcher]]
