"""Training over a network: as on one node, and when a node is cut off in the middle."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_runs import (
    check_resumed_from,
    check_same,
    command,
    kill_tree,
    newest_complete,
    run,
    until_step,
)
from training_runs import write_config
from two_nodes import Node, NoNodes, finish, job, two_nodes

# Processes on each node, and how they are laid out.
TP2_DP2 = (2, ("layout.tensor=2", "layout.data=2"))
PP2 = (1, ("layout.pipeline=2",))
STEPS = 30
SETTINGS = (f"training.steps={STEPS}", "checkpoints.save_every_steps=4", "checkpoints.keep_last=2")
TIME_LIMIT = 12  # seconds; also how far apart the processes may start
SLACK = 15  # for the launcher to notice, and for a busy machine


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_nodes")
    return write_config(folder, folder / "world")


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    try:
        with two_nodes() as made:
            yield made
    except NoNodes as error:
        pytest.skip(f"no network namespaces here: {error}")


def on_one_node(config: Path, out: Path, processes: int, layout: tuple[str, ...]) -> Path:
    done = run(command(config, out, *SETTINGS, *layout, processes=processes))
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.parametrize(
    ("per_node", "layout"),
    [pytest.param(*TP2_DP2, id="tp2_dp2"), pytest.param(*PP2, id="pp2", marks=pytest.mark.slow)],
)
def test_two_nodes_train_what_one_node_trains(
    tmp_path: Path,
    config: Path,
    nodes: tuple[Node, Node],
    per_node: int,
    layout: tuple[str, ...],
) -> None:
    """Bit for bit: the same processes in the same layout, and only the way between them differs."""
    with job(nodes, per_node, config, tmp_path / "two", *SETTINGS, *layout) as launchers:
        for code, said in finish(launchers, 120):
            assert code == 0, said
    check_same(tmp_path / "two", on_one_node(config, tmp_path / "one", 2 * per_node, layout), STEPS)


@pytest.mark.parametrize(
    ("per_node", "layout", "first"),
    [
        pytest.param(*PP2, "pull", id="pp2-pull"),
        pytest.param(*PP2, "kill", id="pp2-kill", marks=pytest.mark.slow),
        pytest.param(*TP2_DP2, "pull", id="tp2_dp2-pull", marks=pytest.mark.slow),
        pytest.param(*TP2_DP2, "kill", id="tp2_dp2-kill", marks=pytest.mark.slow),
    ],
)
def test_when_a_node_is_cut_off_the_other_fails_in_time_and_the_next_start_goes_on(
    tmp_path: Path,
    config: Path,
    nodes: tuple[Node, Node],
    per_node: int,
    layout: tuple[str, ...],
    first: str,
) -> None:
    """Cut off by its cable, or by kill -9 of all its processes while the cable stays."""
    out = tmp_path / "cut"
    settings = (*SETTINGS, *layout, f"layout.time_limit_seconds={TIME_LIMIT}")
    with job(nodes, per_node, config, out, *settings) as (survivor, lost):
        said = "".join(until_step(survivor, STEPS // 3))
        assert [survivor.poll(), lost.poll()] == [None, None], said
        since = time.monotonic()
        if first == "pull":
            nodes[1].pull_the_cable()
        else:
            kill_tree(lost)
        code, rest = finish([survivor], TIME_LIMIT + SLACK)[0]
        assert code != 0
        took = time.monotonic() - since
        kill_tree(lost)
        nodes[1].put_the_cable_back()
    assert took < TIME_LIMIT + SLACK
    # The rank, the operation, the axis and the step are named.
    assert "failed on rank" in rest, rest
    assert f"time limit {TIME_LIMIT} s" in rest, rest
    assert "at step " in rest
    saved = newest_complete(out)
    assert saved is not None

    with job(nodes, per_node, config, out, *settings) as launchers:
        ended = finish(launchers, 120)
        assert [code for code, _ in ended] == [0, 0], ended
    check_resumed_from(saved, ended[0][1])
    check_same(out, on_one_node(config, tmp_path / "whole", 2 * per_node, layout), STEPS)
