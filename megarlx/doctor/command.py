"""`megarlx doctor`: gathers what there is, a few looks at a time, and tells it."""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from megarlx import __version__
from megarlx.doctor.card import check_auto, check_card
from megarlx.doctor.findings import Finding, as_json, as_text
from megarlx.doctor.look import Look, look_at
from megarlx.doctor.machine import (
    Nvidia,
    check_build_tools,
    check_launcher,
    check_nvcc,
    check_nvidia,
    find_nvidia,
)
from megarlx.doctor.native_code import BUILD_FILE, check_index, check_ops, read_build
from megarlx.doctor.packages import NEEDED, OPTIONAL, check_package
from megarlx.doctor.ranks import check_ranks, place_in_job
from megarlx.doctor.torch_stack import check_gloo, check_torch

OURS = ("torch", "torch.distributed", "megarlx.ops.native", "megarlx._index")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--time-limit-seconds",
        type=_seconds,
        default=60.0,
        metavar="N",
        help="longest wait for one package to import, or for other ranks (default: 60)",
    )
    parser.add_argument(
        "--layout",
        type=_layout,
        metavar="tp,pp,dp",
        help="groups to try under a launcher (default: tp inside each node, dp over the nodes)",
    )


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= 3600:
        raise argparse.ArgumentTypeError(f"is {text}; allowed is above 0, up to 3600")
    return seconds


def _layout(text: str) -> str:
    sizes = text.split(",")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"is {text}; expected three sizes as 2,1,4")
    return text


def run(arguments: argparse.Namespace) -> int:
    limit = arguments.time_limit_seconds
    place = place_in_job()
    if place is None:
        findings, ill_only = examine(limit), False
    else:
        # First the ranks, which must all come at the same time; then each node for itself, whose
        # packages only one of its ranks has to look at.
        findings = check_ranks(place, arguments.layout, limit)
        findings += examine(limit) if place.local_rank == 0 else []
        ill_only = place.rank > 0
        if ill_only:
            findings = [_of_node(finding) for finding in findings if not finding.well]
    if findings or not ill_only:
        sys.stdout.write(as_json(findings) if arguments.json else as_text(findings))
    return 0 if all(finding.well for finding in findings) else 1


def _of_node(finding: Finding) -> Finding:
    return dataclasses.replace(finding, part=f"{platform.node()}: {finding.part}")


def examine(time_limit_seconds: float) -> list[Finding]:
    modules = [*OURS, *(package.module for package in (*OPTIONAL, *NEEDED))]
    looks = _look_at_all(modules, time_limit_seconds)
    torch = looks["torch"]
    nvidia = find_nvidia(time_limit_seconds)
    # Without torch there is no telling how what stands on it is.
    native = _check_native(looks, nvidia) if torch.ok else []
    cuda_ops = any(finding.part == "CUDA ops" and finding.state == "ok" for finding in native)
    return [
        Finding("megarlx", "ok", f"{__version__}, Python {platform.python_version()}, {_system()}"),
        check_nvidia(nvidia),
        *check_torch(torch, nvidia),
        *([check_gloo(torch, looks["torch.distributed"])] if torch.ok else []),
        *native,
        *(check_package(p, looks[p.module], nvidia) for p in (*NEEDED, *OPTIONAL)),
        *check_card(looks, nvidia, cuda_ops=cuda_ops, time_limit_seconds=time_limit_seconds),
        *(check_auto(looks, nvidia) if torch.ok else []),
        check_launcher(),
        check_nvcc(torch.facts.get("cuda"), time_limit_seconds),
        *check_build_tools(built=BUILD_FILE.exists()),
    ]


def _check_native(looks: Mapping[str, Look], nvidia: Nvidia) -> list[Finding]:
    build = read_build()
    index = check_index(build is not None, looks["megarlx._index"])
    if isinstance(build, Finding):
        return [build, index]
    return [*check_ops(build, looks["torch"], looks["megarlx.ops.native"], nvidia), index]


def _look_at_all(modules: Sequence[str], time_limit_seconds: float) -> dict[str, Look]:
    # Few at once: an import that waits for the others' disk and cores must not seem to hang.
    with ThreadPoolExecutor(max(2, min(4, os.cpu_count() or 1))) as pool:
        looks = pool.map(lambda module: look_at(module, time_limit_seconds), modules)
        return dict(zip(modules, looks, strict=True))


def _system() -> str:
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
