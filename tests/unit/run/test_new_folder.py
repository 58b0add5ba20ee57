"""A start that fails takes back what it made, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megarlx.comm.groups import Group
from megarlx.run.lock import run_lock
from megarlx.run.new_folder import NewFolder


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def write_run(out: Path) -> None:
    (out / "logs").mkdir(parents=True, exist_ok=True)
    (out / "logs" / "rank_00000.log").write_text("…")
    (out / "lineage.json").write_text("{}")


def start(out: Path, act: Callable[[NewFolder], None], *, first: bool = True) -> None:
    with NewFolder(out, first=first) as folder:
        act(folder)
        raise ValueError("no such prompts")


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("before", [".", "studies", "studies/runs"])
def test_an_error_before_the_first_step_leaves_the_folders_as_they_were(
    tmp_path: Path, before: str, written: bool
) -> None:
    (tmp_path / before).mkdir(parents=True, exist_ok=True)
    out, there = tmp_path / "studies" / "runs" / "one", tree(tmp_path)
    undone: list[str] = []

    def act(folder: NewFolder) -> None:
        if written:
            write_run(out)
            folder.undo.append(lambda: undone.append("reference"))

    with pytest.raises(ValueError, match="no such prompts"):
        start(out, act)
    assert tree(tmp_path) == there
    assert undone == ["reference"] * written


def test_what_was_there_or_has_begun_or_is_another_ranks_stays(tmp_path: Path) -> None:
    acts: dict[str, Callable[[NewFolder], None]] = {
        "there": lambda _: None,
        "begun": NewFolder.keep,
        "of_rank_1": lambda _: None,
    }
    (tmp_path / "there").mkdir()
    for name, act in acts.items():
        out = tmp_path / name

        def written(
            folder: NewFolder, out: Path = out, act: Callable[[NewFolder], None] = act
        ) -> None:
            write_run(out)
            act(folder)

        with pytest.raises(ValueError, match="no such prompts"):
            start(out, written, first=name != "of_rank_1")
    with NewFolder(tmp_path / "well", first=True):
        write_run(tmp_path / "well")
    for name in (*acts, "well"):
        assert tree(tmp_path / name) == {"lineage.json", "logs", "logs/rank_00000.log"}


def test_a_neighbour_that_came_in_between_stays(tmp_path: Path) -> None:
    runs = tmp_path / "runs"

    def both(_: NewFolder) -> None:
        write_run(runs / "one")
        write_run(runs / "two")

    with pytest.raises(ValueError, match="no such prompts"):
        start(runs / "one", both)
    assert tree(runs) == {"two", "two/lineage.json", "two/logs", "two/logs/rank_00000.log"}


def test_a_folder_in_which_another_job_is_at_work_stays(tmp_path: Path) -> None:
    out = tmp_path / "one"
    late = NewFolder(out, first=True)  # both found that the folder was not there
    with run_lock(out, Group.alone("world")):
        write_run(out)
        with pytest.raises(ValueError, match="too late"), late:
            raise ValueError("too late")
        assert (out / "lineage.json").exists()
