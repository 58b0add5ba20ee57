"""Run as a script by each rank of a job: meets the others and prints findings as JSON.

rank_child.py SECONDS LAYOUT        LAYOUT is tp,pp,dp, or empty: tp on a node, dp over the nodes
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import socket
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import megarlx
from megarlx.comm import launch
from megarlx.comm.collectives import all_reduce_, barrier, gather_values, receive_, send
from megarlx.comm.groups import CollectiveError, Group, Layout, Mesh, bytes_sent
from megarlx.doctor.findings import Finding, State, pip_install
from megarlx.ops import native

# What must be the same everywhere, or ranks compute different things or do not understand each
# other.
PACKAGES = ("megarlx", "torch", "transformer-engine", "flash-attn", "safetensors", "numpy")
PROBE_SECONDS = 2.0
LATE = 5.0  # seconds past a limit in which an error still counts as in time
MEGABYTES = {"cuda": 256, "cpu": 8}
ROUNDS = 5


def facts(device: torch.device, launched: launch.Launch) -> dict[str, Any]:
    """What must agree between the ranks, as one JSON value."""
    versions = {"python": platform.python_version(), "CUDA": str(torch.version.cuda)}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    # These may run from a folder without being installed, or say more than their package does.
    versions |= {"megarlx": megarlx.__version__, "torch": str(torch.__version__)}
    if device.type == "cuda":
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        versions["GPU"] = torch.cuda.get_device_name(device)
    else:
        versions["CPU kernels"] = native.load().instruction_set
    return {
        "node": socket.gethostname(),
        "local_rank": launched.local_rank,
        "launcher": launched.launcher,
        "versions": versions,
    }


def check_versions(found: Sequence[Mapping[str, Any]]) -> Finding:
    first = found[0]["versions"]
    for name in first:
        others = [
            rank for rank, one in enumerate(found) if one["versions"].get(name) != first[name]
        ]
        if others:
            there = found[others[0]]["versions"].get(name)
            nodes = sorted({found[rank]["node"] for rank in others})
            detail = (
                f"{name} is {first[name]} on rank 0 and {there} on rank {others[0]} "
                f"({len(others)} ranks differ, on {', '.join(nodes[:8])})"
            )
            mend = pip_install(f"{name}=={first[name]}   (on {nodes[0]})")
            if name not in PACKAGES:
                mend = f"take machines of one kind, or make {name} the same on {nodes[0]}"
            return Finding("versions", "mismatched", detail, mend)
    said = ", ".join(f"{name} {version}" for name, version in first.items() if version != "none")
    return Finding("versions", "ok", f"equal on all ranks: {said}")


def check_places(found: Sequence[Mapping[str, Any]]) -> Finding:
    nodes: dict[str, int] = {}
    for one in found:
        nodes[one["node"]] = nodes.get(one["node"], 0) + 1
    uneven = len(set(nodes.values())) > 1
    shown = ", ".join(f"{node} ({ranks})" for node, ranks in list(nodes.items())[:8])
    detail = f"{len(found)} by {found[0]['launcher']} on {len(nodes)} nodes: {shown}"
    state: State = "mismatched" if uneven else "ok"
    mend = "start as many processes on each node" if uneven else None
    return Finding("ranks", state, detail, mend)


def groups_of(mesh: Mesh) -> list[Group]:
    """Those of several ranks, one for each axis."""
    return [group for group in mesh.groups if group.size > 1]


def check_groups(mesh: Mesh, device: torch.device) -> list[str]:
    """An all-reduce in each group, and a number sent around it; the problems of this rank."""
    problems = []
    for group in groups_of(mesh):
        for place in dict.fromkeys((device, torch.device("cpu"))):
            total = int(all_reduce_(torch.tensor([group.global_rank], device=place), group))
            if total != sum(group.ranks):
                problems.append(
                    f"the sum of the ranks over {group.axis} on {place.type} is {total}, not "
                    f"{sum(group.ranks)}"
                )
        got = pass_on(group, device)
        before = group.ranks[group.rank - 1]
        if got != before:
            problems.append(f"rank {before} sent its number over {group.axis}; {got} arrived")
    return problems


def pass_on(group: Group, device: torch.device) -> int:
    """Each rank's number to the next one, the first rank sending first."""
    mine = torch.tensor([group.global_rank], device=device)
    theirs = torch.empty_like(mine)
    following, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    if group.is_first:
        send(mine, group, following)
        receive_(theirs, group, before)
    else:
        receive_(theirs, group, before)
        send(mine, group, following)
    return int(theirs)


def bandwidth(group: Group, device: torch.device) -> float:
    """Bytes a second that this rank sends in an all-reduce, the median of some."""
    tensor = torch.zeros(MEGABYTES[device.type] * 2**20 // 4, device=device)
    times = []
    for _ in range(ROUNDS + 1):
        barrier(group)
        since = time.perf_counter()
        all_reduce_(tensor, group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - since)
    sent = bytes_sent("all_reduce", group.size, tensor.numel() * tensor.element_size())
    return sent / statistics.median(times[1:])


def check_time_limit(world: Group) -> str:
    """All ranks but the first wait for it in vain: each must be told so, and in time."""
    short = Mesh.build(dp=world.size, timeout_seconds=PROBE_SECONDS, backend="gloo").world
    if world.is_first:
        return ""
    since = time.monotonic()
    try:
        all_reduce_(torch.zeros(1), short)
    except CollectiveError:
        took = time.monotonic() - since
        if took <= PROBE_SECONDS + LATE:
            return ""
        return f"rank {world.rank} was told after {took:.1f} s instead of {PROBE_SECONDS:g} s"
    return f"rank {world.rank} was not told that rank 0 did not come"


def layout_of(text: str, launched: launch.Launch) -> Layout:
    if text:
        tp, pp, dp = map(int, text.split(","))
        return Layout(pp=pp, dp=dp, tp=tp)
    on_node = launched.local_world_size
    if launched.world_size % on_node:
        return Layout(dp=launched.world_size)
    return Layout(tp=on_node, dp=launched.world_size // on_node)


def examine(launched: launch.Launch, layout: Layout, seconds: float) -> list[Finding]:
    """On every rank; the findings of all of them are complete on the first."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    launch.start(launched, device, seconds)
    if device.type == "cuda":
        device = torch.device("cuda", launched.local_rank)
    mesh = Mesh.build(
        pp=layout.pp, dp=layout.dp, tp=layout.tp, timeout_seconds=seconds, device=device
    )
    world = mesh.world
    found = gather_values(facts(device, launched), world)
    wrong = _all_problems(gather_values(check_groups(mesh, device), world))
    names = ", ".join(dict.fromkeys(group.axis for group in groups_of(mesh)))
    detail = f"{layout}: sums and messages arrive in {names}"
    findings = [
        check_places(found),
        check_versions(found),
        Finding("groups", "broken", wrong, "export NCCL_DEBUG=INFO   (and start again)")
        if wrong
        else Finding("groups", "ok", detail),
    ]
    for group in (mesh.tp, mesh.pp, mesh.dp, world):
        if group.size > 1:
            speeds = gather_values(bandwidth(group, device), world)
            slowest = min(range(world.size), key=speeds.__getitem__)
            findings.append(
                Finding(
                    f"bandwidth {group.axis}",
                    "ok",
                    f"all-reduce of {MEGABYTES[device.type]} MB: {speeds[slowest] / 1e9:.2f} GB/s "
                    f"sent by rank {slowest} on {found[slowest]['node']}, the slowest; "
                    f"{statistics.median(speeds) / 1e9:.2f} in the middle",
                )
            )
    late = next(filter(None, gather_values(check_time_limit(world), world)), "")
    findings.append(
        Finding("time limits", "broken", late, pip_install("--force-reinstall torch"))
        if late
        else Finding("time limits", "ok", "a rank that does not come is told of, in time")
    )
    return findings if world.is_first else []


def _all_problems(of_ranks: Sequence[Sequence[str]]) -> str:
    problems = [f"rank {rank}: {one}" for rank, some in enumerate(of_ranks) for one in some]
    return "; ".join(problems[:4]) + (f" and {len(problems) - 4} more" if problems[4:] else "")


def main(seconds: float, layout: str) -> None:
    # What libraries print goes to stderr; only the answer goes to stdout.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    launched = launch.read()
    findings = examine(launched, layout_of(layout, launched), seconds)
    json.dump([dataclasses.asdict(finding) for finding in findings], answer)
    answer.flush()
    # Not by the usual way out: the group whose time limit was tried is broken by design.
    os._exit(0)


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2])
