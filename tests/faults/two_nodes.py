"""Two nodes on one machine: network namespaces, joined by a cable that can be pulled.

Each node has its own loopback and its own interface, so that nothing of one reaches the other but
through the cable. Files are shared, as on a cluster with a common file system.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fault_runs import command, started

PORT = 29411


class NoNodes(Exception):
    """This machine, or this user, may not make network namespaces."""


@dataclass(frozen=True)
class Node:
    """A network namespace with its end of the cable."""

    name: str
    interface: str
    address: str
    rank: int

    def inside(self, words: list[str]) -> list[str]:
        """A command as it is run on this node."""
        return [
            *("ip", "netns", "exec", self.name),
            *("env", f"GLOO_SOCKET_IFNAME={self.interface}", "TORCH_CPP_LOG_LEVEL=ERROR"),
            *words,
        ]

    def pull_the_cable(self) -> None:
        _ip("-n", self.name, "link", "set", self.interface, "down")

    def put_the_cable_back(self) -> None:
        _ip("-n", self.name, "link", "set", self.interface, "up")


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Raises NoNodes where they cannot be made; leaves nothing behind."""
    if shutil.which("ip") is None:
        raise NoNodes("there is no `ip` program (package iproute2)")
    mark = f"mg{os.getpid()}"  # an interface's name has at most 15 letters
    nodes = tuple(
        Node(f"{mark}-{letter}", f"{mark}{letter}", f"10.213.77.{rank + 1}", rank)
        for rank, letter in enumerate("ab")
    )
    with ExitStack() as undo:
        for node in nodes:
            _ip("netns", "add", node.name)
            undo.callback(_ip, "netns", "del", node.name)  # takes the cable with it
        first, second = nodes
        _ip(
            *("link", "add", first.interface, "netns", first.name, "type", "veth"),
            *("peer", "name", second.interface, "netns", second.name),
        )
        for node in nodes:
            _ip("-n", node.name, "addr", "add", f"{node.address}/24", "dev", node.interface)
            _ip("-n", node.name, "link", "set", "lo", "up")
            _ip("-n", node.name, "link", "set", node.interface, "up")
        yield first, second


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoNodes(f"`ip {' '.join(words)}`: {done.stderr.strip()}")


def torchrun_on(node: Node, host: Node, processes_per_node: int, words: list[str]) -> list[str]:
    """The node's share of a job on two nodes; `host` keeps the store through which they meet."""
    # torchrun looks for its own host name among the machine's addresses to see whether it keeps
    # the store; here both nodes have one host name, so it is told.
    is_host = int(node == host)
    launcher = [
        *("torchrun", "--nnodes", "2", "--node-rank", str(node.rank)),
        *("--nproc-per-node", str(processes_per_node), "--local-addr", node.address),
        *("--rdzv-backend", "c10d", "--rdzv-id", "two_nodes"),
        *("--rdzv-endpoint", f"{host.address}:{PORT}"),
        *("--rdzv-conf", f"is_host={is_host},join_timeout=60,read_timeout=10"),
    ]
    python, *rest = words
    return node.inside([python, "-m", "torch.distributed.run", *launcher[1:], *rest])


@contextmanager
def job(
    nodes: tuple[Node, Node], processes_per_node: int, config: Path, out: Path, *overrides: str
) -> Iterator[list[subprocess.Popen[str]]]:
    """`megarlx train` on both nodes, started; nothing of it is left behind."""
    words = command(config, out, *overrides)
    with ExitStack() as stack:
        yield [
            stack.enter_context(started(torchrun_on(node, nodes[0], processes_per_node, words)))
            for node in nodes
        ]


def finish(processes: list[subprocess.Popen[str]], seconds: float) -> list[tuple[int, str]]:
    """Exit code and output of each node's torchrun."""
    ended = []
    for process in processes:
        said, _ = process.communicate(timeout=seconds)
        ended.append((process.returncode, said))
    return ended
