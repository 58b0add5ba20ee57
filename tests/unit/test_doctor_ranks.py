"""The doctor under a launcher: what ranks find together, and what keeps them from it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megarlx.cli import main
from megarlx.comm.launch import Launch
from megarlx.doctor.rank_child import check_places, check_versions, layout_of
from megarlx.doctor.ranks import Place, check_ranks, place_in_job

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, None),
        ({"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1"}, Place(8, 5, 1)),
        (
            {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"},
            Place(4, 3, 1),
        ),
        (
            {
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_RANK": "2",
                "OMPI_COMM_WORLD_LOCAL_RANK": "0",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_PROCID": "0",
                "SLURM_LOCALID": "0",
            },
            Place(4, 2, 0),
        ),
        ({"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "0"}, Place(2, 1, 0)),
    ],
)
def test_the_place_in_a_job_is_read_as_the_launchers_set_it(
    environment: dict[str, str], place: Place | None
) -> None:
    assert place_in_job(environment) == place


def of_rank(node: str, **versions: str) -> dict[str, Any]:
    return {"node": node, "launcher": "torchrun", "versions": {"torch": "2.13.0", **versions}}


def test_a_version_that_differs_is_told_with_both_and_where() -> None:
    ranks = [of_rank("a"), of_rank("a"), of_rank("b", torch="2.11.0"), of_rank("b", torch="2.11.0")]
    found = check_versions(ranks)
    assert (found.state, found.part) == ("mismatched", "versions")
    assert found.detail == ("torch is 2.13.0 on rank 0 and 2.11.0 on rank 2 (2 ranks differ, on b)")
    assert "pip install torch==2.13.0" in str(found.mend)
    assert check_versions(ranks[:2]).state == "ok"


def test_machines_of_two_kinds_are_mismatched() -> None:
    ranks = [of_rank("a", **{"CPU kernels": "avx512"}), of_rank("b", **{"CPU kernels": "avx2"})]
    found = check_versions(ranks)
    assert found.state == "mismatched"
    assert "CPU kernels is avx512 on rank 0 and avx2 on rank 1" in found.detail
    assert "pip" not in str(found.mend)


def test_nodes_with_unlike_numbers_of_ranks_are_told() -> None:
    ranks = [of_rank("a"), of_rank("a"), of_rank("b")]
    assert check_places(ranks).state == "mismatched"
    assert "a (2), b (1)" in check_places(ranks).detail
    assert check_places(ranks[1:]).state == "ok"


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("", "pp=1 replica=1 dp=2 tp=4"), ("2,4,1", "pp=4 replica=1 dp=1 tp=2")],
)
def test_groups_are_those_asked_for_or_tensor_parallel_in_a_node(text: str, sizes: str) -> None:
    launched = Launch(rank=5, local_rank=1, world_size=8, local_world_size=4, launcher="torchrun")
    assert str(layout_of(text, launched)) == sizes


def test_a_rank_whose_peers_do_not_come_says_so_within_its_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }.items():
        monkeypatch.setenv(name, value)
    (found,) = check_ranks(Place(2, 1, 1), None, 2.0)
    assert (found.part, found.state) == ("rank 1", "broken")
    assert "rank 1 of 2 could not meet the others at 127.0.0.1" in found.detail
    assert "GLOO_SOCKET_IFNAME" in str(found.mend)


def test_a_child_that_dies_is_told_by_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # half an environment: the child cannot read it
    monkeypatch.delenv("RANK", raising=False)
    (found,) = check_ranks(Place(2, 0, 0), None, 2.0)
    assert "RANK, LOCAL_RANK" in found.detail


@pytest.mark.parametrize("layout", ["2", "2,0,1", "a,b,c"])
def test_a_layout_that_is_none_is_refused(layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "--layout", layout])
    assert "expected three sizes" in capsys.readouterr().err


def test_ranks_of_a_torchrun_find_each_other_well_and_report_once() -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "megarlx", "doctor", "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    answer = json.loads(done.stdout)  # one report: the other rank had nothing to say
    found = {finding["part"]: finding for finding in answer["findings"]}
    for part in ("ranks", "versions", "groups", "bandwidth tp", "time limits"):
        assert found[part]["state"] == "ok", found[part]
    assert "2 by torchrun on 1 nodes" in found["ranks"]["detail"]
    assert "torch" in found  # this node's packages too
